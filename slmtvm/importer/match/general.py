"""What no recogniser takes, spelled as the file has it: sums over features, features put together.

Slower than what is recognised, and as exact.
"""

from __future__ import annotations

import numpy as np

from slmtvm.importer.compute import compute
from slmtvm.importer.cover import Cover
from slmtvm.importer.graph import Node
from slmtvm.importer.steps import Concat, Param, Reduce, Reordered, Rows, Step

_REDUCTIONS = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "ReduceMin": "min"}


def match_reduction(cover: Cover, node: Node, value: str) -> Step | None:
    """One number for each token out of all its features; None for anything else."""
    op = _REDUCTIONS.get(node.op_type)
    if op is None or cover.width(value) != 1 or cover.width(node.inputs[0]) is None:
        return None
    cover.note(
        f"{node.op_type} of each row outside of a norm that is recognised: a kernel of its own"
    )
    return Reduce(op, cover.need(node.inputs[0]))


def match_concat(cover: Cover, node: Node, value: str) -> Step | None:
    """Features of several values side by side; None where other tokens or constants are."""
    frame = cover.frame
    if node.op_type != "Concat" or any(i not in frame.small.shapes for i in node.inputs):
        return None
    numbers, tokens, features = [], [], []
    elements = width = 0
    for name in node.inputs:
        layout = frame.rows(name)
        numbers.append(np.arange(layout.size).reshape(frame.small.shapes[name]) + elements)
        place = np.empty(layout.size, np.int64)
        place[layout.reshape(-1)] = np.arange(layout.size)
        tokens.append(place // layout.shape[1])
        features.append(place % layout.shape[1] + width)
        elements, width = elements + layout.size, width + layout.shape[1]
    (joined,) = compute(frame.graph, node, numbers)
    index = joined.reshape(-1)[frame.rows(value)]
    order = np.concatenate(features)[index]
    own = np.concatenate(tokens)[index] == np.arange(frame.small.length)[:, None]
    if not own.all() or (order != order[:1]).any():
        return None
    parts = Concat(tuple(cover.need(name) for name in node.inputs))
    if (order[0] == np.arange(width)).all():
        return parts
    rows = Rows(f"{value}#parts")
    cover.add(rows, parts)
    return Reordered(rows, Param(f"{value}.order", order[0].astype(np.int32)))
