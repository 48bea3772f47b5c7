"""Ops on single elements, activations among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.operators.elementwise import gelu_erf, gelu_tanh, sigmoid
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.evidence.pieces import Account, in_arrays, probing_numbers
from slmtvm.importer.recognise.evidence.ranges import FINITE
from slmtvm.importer.recognise.evidence.regions import between, constants_of, dominators, signature
from slmtvm.importer.recognise.rows.formulas import emit, formula
from slmtvm.importer.recognise.rows.general import spread
from slmtvm.importer.recognise.steps import Elementwise, Param, Rows, Same, Step

# The graph's constants are roundings of the formulas' numbers: to float32, or to 16 bits.
_TOLERANCE = 1e-6
_TOLERANCE_16_BITS = {"float16": 1e-3, "bfloat16": 8e-3}

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "": lambda x: x,
    "nn.silu": lambda x: x * sigmoid(x),
    "nn.gelu": gelu_erf,
    "nn.gelu_tanh": gelu_tanh,
    "nn.relu": lambda x: np.maximum(x, 0),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
}
_WITHOUT_CONSTANTS = ("", "nn.relu")  # nothing of them is rounded


def match_activation(cover: Cover, value: str) -> Step | None:
    """``value`` as a known function of one other value, however the graph spells it.

    The part of the graph between them is computed on sample numbers and compared with each known
    function, and with the nearest one on all that ``pieces`` knows to ask. The identity (dropout, a
    guard against NaN) disappears.
    """
    frame = cover.frame

    def allowed(node: Node) -> bool:
        kind = operator_of(node).kind
        if kind is Kind.MOVE:
            return not frame.small.is_lookup(node)
        return kind is Kind.ELEMENTWISE and all(
            not i or i in frame.small.shapes or frame.uniform(i) is not None for i in node.inputs
        )

    for x in reversed(dominators(frame, value, allowed)):
        width = cover.width(x)
        if frame.small.dtypes[x].kind in "iub" or width is None or width != cover.width(value):
            continue
        nodes = between(frame, x, value)
        key = ("activation", signature(frame, nodes, x, value))
        if key not in cover.cache:
            cover.cache[key] = _function(cover, x, value, nodes)
        name = cover.cache[key]
        if isinstance(name, str):
            source = cover.need(x)
            return Elementwise(name, (source,)) if name else Same(source)
    return None


def _function(cover: Cover, x: str, value: str, nodes: Sequence[Node]) -> str | None:
    """Which of the known functions ``nodes`` compute from ``x``; None for any other."""
    frozen = cover.frame.small
    shape = (frozen.length, cover.frame.features(x))
    tolerance = _tolerance(cover, nodes)
    near = cover.random.normal(size=(cover.frame.samples, shape[1])) * 4
    result = cover.probe(nodes, x, value, near)
    # The nearest one: rounded constants bring both formulas of GELU within the tolerance.
    errors = {name: _error(result, near, f(near)) for name, f in _ACTIVATIONS.items()}
    name = min(errors, key=lambda key: errors[key])
    if name in _WITHOUT_CONSTANTS:
        tolerance = _TOLERANCE
    if errors[name] > tolerance:
        return None
    account = Account(frozen, nodes, {x: FINITE})
    for samples in in_arrays(probing_numbers(frozen, nodes), shape):
        values = cover.probe_all(nodes, x, samples)
        result = None if values is None else cover.rows_of(values, value)
        expected = _ACTIVATIONS[name](samples)
        if values is None or result is None:
            return None
        # Far out the graph's own spelling may overflow.
        result = np.where(np.isfinite(result), result, expected)
        if _error(result, samples, expected) > tolerance:
            return None
        account.see(values)
    return name if account.missing is None else None


def _error(result: Array | None, x: Array, expected: Array) -> float:
    """How far ``result`` is from ``expected`` of x, relative to its size and that of x up to 1."""
    if result is None:
        return math.inf
    size = np.abs(expected) + np.minimum(np.abs(x), 1)
    error = np.abs(result - expected) / np.where(size, size, 1)
    largest = float(np.max(error))
    return largest if math.isfinite(largest) else math.inf


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
