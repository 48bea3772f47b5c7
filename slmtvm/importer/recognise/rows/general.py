"""What no recogniser takes, spelled as the file has it: sums over features, features put together.

Slower than what is recognised, and as exact.
"""

from __future__ import annotations

import math

import numpy as np

from slmtvm.importer.frame.frame import Frame
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators.compute import compute, operator_of
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.steps import Concat, Param, Reduce, Reordered, Rows, Step

_REDUCTIONS = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "ReduceMin": "min"}


def match_reduction(cover: Cover, node: Node, value: str) -> Step | None:
    """Numbers for each token, each out of some of its features; None for anything else."""
    op, x = _REDUCTIONS.get(node.op_type), node.inputs[0]
    if op is None or cover.width(value) is None or cover.width(x) is None:
        return None
    number_of = _by_feature(cover.frame, value, _reduced_into(cover.frame, node, value), x)
    if number_of is None:
        return None
    cover.note(
        f"{node.op_type} of each row outside of a norm that is recognised: a kernel of its own"
    )
    source, features = cover.moved(x)
    parts = [
        Reduce(op, cover.columns(source, features[number_of == number]))
        for number in range(cover.frame.features(value))
    ]
    if len(parts) == 1:
        return parts[0]
    return Concat(tuple(cover.add(f"{value}#{i}", part) for i, part in enumerate(parts)))


def spread(cover: Cover, name: str, value: str) -> Rows | None:
    """The rows of an operand with a feature for each one of ``value``, which it is broadcast to;
    None where that is of other tokens."""
    frame = cover.frame
    numbers = np.arange(frame.rows(name).size).reshape(frame.small.shapes[name])
    wide = np.broadcast_to(numbers, frame.small.shapes[value])
    of_value = _by_feature(frame, name, wide, value)
    if of_value is None:
        return None
    source, features = cover.moved(name)
    return cover.columns(source, features[of_value])


def _reduced_into(frame: Frame, node: Node, value: str) -> Array:
    """For each element that ``node`` reduces, the number of the element of its result."""
    shape = frame.small.shapes[node.inputs[0]]
    operator = operator_of(node)
    assert operator.axes is not None
    given = [frame.small.constants[i].values() if i else None for i in node.inputs[1:]]
    axes, _ = operator.axes(node.attrs, [None, *given], len(shape))
    kept = [1 if axis in axes else d for axis, d in enumerate(shape)]
    return np.broadcast_to(np.arange(math.prod(kept)).reshape(kept), shape)


def _by_feature(frame: Frame, of: str, numbers: Array, value: str) -> Array | None:
    """For each feature of ``value`` the feature of ``of`` that it goes with, (features,).

    numbers: which element of ``of`` each element of ``value`` goes with. None where it is one of
    another token, or others go together in other rows.
    """
    token, feature = frame.places(of, numbers.reshape(-1)[frame.rows(value)])
    own = (token == np.arange(frame.small.length)[:, None]).all()
    return feature[0] if own and (feature == feature[:1]).all() else None


def match_concat(cover: Cover, node: Node, value: str) -> Step | None:
    """Features of several values side by side; None where other tokens or constants are."""
    frame = cover.frame
    if node.op_type != "Concat" or any(i not in frame.small.shapes for i in node.inputs):
        return None
    numbers, tokens, features = [], [], []
    elements = width = 0
    for name in node.inputs:
        own = np.arange(frame.rows(name).size)
        token, feature = frame.places(name, own)
        numbers.append(own.reshape(frame.small.shapes[name]) + elements)
        tokens.append(token)
        features.append(feature + width)
        elements, width = elements + own.size, width + frame.features(name)
    (joined,) = compute(frame.graph, node, numbers)
    index = joined.reshape(-1)[frame.rows(value)]
    order = np.concatenate(features)[index]
    in_place = np.concatenate(tokens)[index] == np.arange(frame.small.length)[:, None]
    if not in_place.all() or (order != order[:1]).any():
        return None
    parts = Concat(tuple(cover.need(name) for name in node.inputs))
    if (order[0] == np.arange(width)).all():
        return parts
    rows = cover.add(f"{value}#parts", parts)
    return Reordered(rows, Param(f"{value}.order", order[0].astype(np.int32)))
