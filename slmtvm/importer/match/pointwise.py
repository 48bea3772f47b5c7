"""Ops on single elements, activations among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.compute import operator_of
from slmtvm.importer.cover import Cover
from slmtvm.importer.frame import uniform
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.match.formulas import emit, formula
from slmtvm.importer.match.general import spread
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.elementwise import gelu_erf, gelu_tanh, sigmoid
from slmtvm.importer.regions import between, constants_of, dominators
from slmtvm.importer.steps import Elementwise, Param, Rows, Same, Step

# The graph's constants are roundings of the formulas' numbers: to float32, or to 16 bits.
_TOLERANCE = 1e-6
_TOLERANCE_16_BITS = {"float16": 1e-3, "bfloat16": 8e-3}
# Decimal orders of the largest samples; in float16 less than what overflows, where clamps stand.
_FARTHEST, _FARTHEST_16_BITS = 30.0, 3.5

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "": lambda x: x,
    "nn.silu": lambda x: x * sigmoid(x),
    "nn.gelu": gelu_erf,
    "nn.gelu_tanh": gelu_tanh,
    "nn.relu": lambda x: np.maximum(x, 0),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
}


def match_activation(cover: Cover, value: str) -> Step | None:
    """``value`` as a known function of one other value, however the graph spells it.

    The part of the graph between them is computed on sample numbers and compared with each known
    function. The identity (dropout, a guard against NaN) disappears.
    """
    frame = cover.frame

    def allowed(node: Node) -> bool:
        kind = operator_of(node).kind
        if kind is Kind.MOVE:
            return not frame.small.is_lookup(node)
        return kind is Kind.ELEMENTWISE and all(
            not i or i in frame.small.shapes or uniform(frame.small, i) is not None
            for i in node.inputs
        )

    for x in reversed(dominators(frame, value, allowed)):
        width = cover.width(x)
        if frame.small.dtypes[x].kind in "iub" or width is None or width != cover.width(value):
            continue
        nodes = between(frame, x, value)
        tolerance = _tolerance(cover, nodes)
        near = cover.random.normal(size=(frame.samples, width)) * 4
        # A clamp is none of these functions, however far out it stands.
        orders = _FARTHEST if tolerance == _TOLERANCE else _FARTHEST_16_BITS
        far = near * np.logspace(0, orders, near.size).reshape(near.shape)
        results = [cover.probe(nodes, x, value, samples) for samples in (near, far)]
        # The nearest one: rounded constants bring both formulas of GELU within the tolerance.
        errors = {name: _error(results[0], f(near)) for name, f in _ACTIVATIONS.items()}
        name = min(errors, key=lambda key: errors[key])
        expected = _ACTIVATIONS[name](far)
        # Far out the graph's own spelling may overflow.
        end = results[1]
        end = None if end is None else np.where(np.isfinite(end), end, expected)
        if max(errors[name], _error(end, expected)) <= tolerance:
            source = cover.need(x)
            return Elementwise(name, (source,)) if name else Same(source)
    return None


def _error(result: Array | None, expected: Array) -> float:
    """How far ``result`` is from ``expected``, relative to 1 + its size."""
    if result is None:
        return math.inf
    error = float(np.max(np.abs(result - expected) / (1 + np.abs(expected))))
    return error if math.isfinite(error) else math.inf


def _tolerance(cover: Cover, nodes: Sequence[Node]) -> float:
    """How far the region's own constants may take it from the formula that they round."""
    names = {str(c.dtype) for c in constants_of(cover.frame.small, nodes)}
    return max((_TOLERANCE_16_BITS.get(name, _TOLERANCE) for name in names), default=_TOLERANCE)


def match_elementwise(cover: Cover, value: str) -> Step:
    """``value`` as standard Relax ops; raises UnsupportedOpError where there are none."""
    frame = cover.frame
    node = frame.producers[value]
    where = frame.graph.where(node)
    if node.op_type == "Dropout":
        raise UnsupportedOpError(
            "its training_mode is on, so it drops at random; export the model in evaluation mode",
            where=where,
        )
    write = formula(node.domain, node.op_type)
    if write is None or frame.small.dtypes[value].kind in "iub":
        raise UnsupportedOpError(
            "this operator on values that depend on tokens is supported only inside patterns "
            "that are recognised (attention, norms, activations), and this is none of them",
            where=where,
        )
    names = list(node.inputs)
    while not names[-1]:
        names.pop()
    operands = [operand(cover, name, value) if name else None for name in names]
    return emit(cover, value, write(node.attrs, *operands))


def operand(cover: Cover, name: str, value: str) -> Rows | Param | float:
    """An operand of the elementwise op that makes ``value``, rows of it to be found."""
    frame = cover.frame
    if name not in frame.small.shapes:
        return cover.constant_operand(name, value)
    width, full = frame.features(name), frame.features(value)
    if width not in (1, full):
        rows = spread(cover, name, value)
        if rows is not None:
            return rows
        raise UnsupportedOpError(
            f"operands with {width} and {full} features for each token are not supported",
            where=frame.where(value),
        )
    return cover.need(name)
