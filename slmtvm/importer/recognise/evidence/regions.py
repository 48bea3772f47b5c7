"""Parts of the graph between two values, computed on chosen numbers.

A recogniser does not compare spellings. It takes the part of the graph between a candidate input
and an output, feeds it numbers, and looks at what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from slmtvm.importer.frame.frame import Frame
from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.graph import Array, Constant, Node, attribute_key
from slmtvm.importer.operators.compute import compute, operator_of
from slmtvm.importer.operators.elementwise import FLOAT_TYPES

ROUNDING = ("QuantizeLinear", "DequantizeLinear")
_MAX_NODES = 400  # of one region; the largest real ones have a few dozen


def dominators(frame: Frame, value: str, allowed: Callable[[Node], bool]) -> list[str]:
    """Values that everything between them and ``value`` depends on alone, nearest first.

    Only nodes that are ``allowed`` are looked through.
    """
    found: list[str] = []
    frontier = {value}
    for _ in range(_MAX_NODES):
        latest = max(frontier, key=lambda v: frame.order.get(v, -1))
        node = frame.producers.get(latest)
        if node is None or not allowed(node):
            break
        frontier.discard(latest)
        frontier.update(frame.dynamic(node))
        if len(frontier) == 1:
            found.extend(frontier)
        if not frontier:
            break
    return found


def between(frame: Frame, start: str, end: str) -> list[Node]:
    """The nodes that compute ``end`` from ``start``, in order."""
    nodes: dict[int, Node] = {}
    todo = [end]
    while todo:
        value = todo.pop()
        if value == start:
            continue
        node = frame.producers[value]
        place = frame.order[value]
        if place not in nodes:
            nodes[place] = node
            todo.extend(frame.dynamic(node))
    return [nodes[place] for place in sorted(nodes)]


Override = Callable[[Sequence["Array | None"]], Array]
"""The one output of a node, from its inputs."""


def evaluate(
    frozen: Frozen,
    nodes: Sequence[Node],
    given: Mapping[str, Array],
    output: str,
    overrides: Mapping[str, Override] | None = None,
) -> Array:
    """``output`` after ``nodes``, see ``evaluate_all``."""
    return evaluate_all(frozen, nodes, given, overrides)[output]


def evaluate_all(
    frozen: Frozen,
    nodes: Sequence[Node],
    given: Mapping[str, Array],
    overrides: Mapping[str, Override] | None = None,
) -> dict[str, Array]:
    """All values of ``nodes``, with ``given`` ones for what they start from.

    Constants take the dtype of the given values where both are floating point, and casts between
    floating-point types do nothing, so that a probe in float64 stays exact; so does rounding with
    constant scales, which only recognisers that say so look through. ``overrides``
    compute nodes, named by their first output, in another way.
    """
    (dtype,) = {v.dtype for v in given.values()}
    values = dict(given)
    for node in nodes:
        if node.op_type == "Cast" and _floating_cast(node, values):
            values[node.outputs[0]] = values[node.inputs[0]]
            continue
        override = (overrides or {}).get(node.outputs[0])
        if override is not None:
            values[node.outputs[0]] = override([values.get(name) for name in node.inputs])
            continue
        if node.op_type in ROUNDING and node.inputs[0] in values:
            values[node.outputs[0]] = values[node.inputs[0]]
            continue
        inputs = [_operand(frozen, values, name, dtype) for name in node.inputs]
        values.update(zip(node.outputs, compute(frozen.graph, node, inputs), strict=False))
    return values


def _floating_cast(node: Node, values: Mapping[str, Array]) -> bool:
    before = values.get(node.inputs[0])
    return before is not None and before.dtype.kind == "f" and node.attrs["to"] in FLOAT_TYPES


def _operand(
    frozen: Frozen, values: Mapping[str, Array], name: str, dtype: np.dtype[np.generic]
) -> Array | None:
    if not name:
        return None
    if name in values:
        return values[name]
    array = frozen.constants[name].values(table=True)
    with np.errstate(all="ignore"):
        return array if array.dtype.kind in "iub" else array.astype(dtype)


def constants_of(frozen: Frozen, nodes: Sequence[Node]) -> list[Constant]:
    """The constants that ``nodes`` read."""
    names = dict.fromkeys(i for node in nodes for i in node.inputs if i in frozen.constants)
    return [frozen.constants[name] for name in names]


def signature(frame: Frame, nodes: Sequence[Node], start: str, end: str) -> Hashable:
    """Equal for regions from ``start`` to ``end`` that compute the same function: same nodes on the
    same constants."""
    numbers = {start: -1}
    parts: list[Hashable] = [frame.small.shapes[start]]
    for node in nodes:
        inputs = tuple(numbers.get(name, name) for name in node.inputs)
        attrs = tuple((k, attribute_key(v)) for k, v in sorted(node.attrs.items()))
        parts.append((node.domain, node.op_type, operator_of(node).since, inputs, attrs))
        for name in node.outputs:
            numbers[name] = len(numbers)
    return (*parts, numbers[end])
