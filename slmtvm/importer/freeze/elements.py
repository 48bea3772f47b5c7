"""Which elements of one value, scaled and shifted, another value holds, by exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import compute, operator_of

_NOTHING = -1  # the index of an element that comes from constants alone
MOVES = frozenset(("Pad", "ScatterND", "Where"))  # beside operators that only move elements
SCALES = frozenset(("Cast", "Div", "Mul", "Neg"))
SHIFTS = frozenset(("Add", "Sub"))


@dataclass(frozen=True, eq=False)
class Elements:
    """A value as ``factor * source.flat[index] + added``, each of the value's shape.

    index: int64, -1 where an element is ``added`` alone; factor, added: float64.
    """

    index: Array
    factor: Array
    added: Array

    @staticmethod
    def constant(values: Array) -> Elements:
        return Elements(
            np.full(values.shape, _NOTHING, np.int64),
            np.zeros(values.shape),
            np.asarray(values, np.float64),
        )

    def each(self, change: Callable[[Array], Array]) -> Elements:
        return Elements(change(self.index), change(self.factor), change(self.added))


def trace(
    frozen: Frozen, producers: Mapping[str, Node], value: str, known: frozenset[str]
) -> tuple[str, Elements] | None:
    """The one value behind ``value``, and which of its elements are where.

    Looked through are operators that move elements, and those of ``known``, with constants. None
    where there is more than one value behind them.
    """
    region: set[str] = set()
    sources: set[str] = set()
    todo = [value]
    while todo:
        name = todo.pop()
        node = producers.get(name)
        if node is None or not _is_known(frozen, node, known):
            sources.add(name)
        elif name not in region:
            region.add(name)
            todo.extend(i for i in node.inputs if i in frozen.shapes)
    if len(sources) != 1:
        return None
    (source,) = sources
    shape = frozen.shapes[source]
    size = int(np.prod(shape, dtype=np.int64))
    found = {
        source: Elements(
            np.arange(size, dtype=np.int64).reshape(shape), np.ones(shape), np.zeros(shape)
        )
    }
    for node in frozen.graph.nodes:
        if not region.isdisjoint(node.outputs):
            result = _apply(frozen, node, found)
            if result is None:
                return None
            found.update(zip(node.outputs, result, strict=False))
    return source, found[value]


def _is_known(frozen: Frozen, node: Node, known: frozenset[str]) -> bool:
    dynamic = [i in frozen.shapes for i in node.inputs]
    kind = operator_of(node).kind
    if node.op_type in ("Add", "Sub", "Mul"):
        return node.op_type in known and sum(dynamic) == 1
    if node.op_type == "Div":
        return node.op_type in known and not dynamic[1]
    if node.op_type == "Where":
        return node.op_type in known and not dynamic[0]
    if node.op_type == "Pad":
        constant = node.attrs.get("mode", "constant") == "constant"
        return node.op_type in known and constant and sum(dynamic) == 1
    if node.op_type == "ScatterND":
        whole = node.attrs.get("reduction", "none") == "none"
        return node.op_type in known and whole and not dynamic[1]
    if node.op_type == "Cast":
        floats = (frozen.dtypes.get(name) for name in (*node.inputs, *node.outputs))
        return node.op_type in known and all(d is not None and d.kind == "f" for d in floats)
    if kind is not Kind.MOVE:
        return node.op_type in known
    data = operator_of(node).data
    return not frozen.is_lookup(node) and not any(dynamic[len(dynamic) if data is None else data :])


def _apply(frozen: Frozen, node: Node, found: Mapping[str, Elements]) -> Sequence[Elements] | None:
    """What ``node`` makes of elements; None where constants are no plain numbers."""
    constants = [
        frozen.constants[i].values() if i and i in frozen.constants else None for i in node.inputs
    ]
    shape = frozen.shapes[next(o for o in node.outputs if o in frozen.shapes)]
    if node.op_type in ("Add", "Sub", "Mul", "Div", "Neg", "Cast"):
        return [_arithmetic(node, constants, found, shape)]
    if node.op_type == "Where":
        return [_chosen(node, constants, found, shape)]
    count = operator_of(node).data or len(node.inputs)
    taken = [0, 2] if node.op_type == "ScatterND" else list(range(min(count, len(node.inputs))))
    given: dict[int, Elements] = {}
    for place in taken:
        values = constants[place]
        given[place] = found[node.inputs[place]] if values is None else Elements.constant(values)
    if node.op_type == "Pad":
        fill = constants[2] if len(constants) > 2 else None
        number = float(node.attrs.get("value", 0) if fill is None or not fill.size else fill.item())
        return [_padded(frozen, node, constants, given[0], number)]
    parts = []
    for part in ("index", "factor", "added"):
        inputs = [
            getattr(given[i], part) if i in given else constants[i] for i in range(len(node.inputs))
        ]
        parts.append(compute(frozen.graph, node, inputs))
    return [Elements(*three) for three in zip(*parts, strict=True)]


def _padded(
    frozen: Frozen, node: Node, constants: Sequence[Array | None], x: Elements, number: float
) -> Elements:
    rest = constants[3:]
    parts = []
    for values, fill in ((x.index, _NOTHING), (x.factor, 0), (x.added, number)):
        if len(node.inputs) == 1:
            (result,) = compute(frozen.graph, _filled(node, fill), [values])
        else:
            (result,) = compute(frozen.graph, node, [values, constants[1], np.array(fill), *rest])
        parts.append(result)
    return Elements(*parts)


def _filled(node: Node, fill: float) -> Node:
    return Node(
        node.domain, node.op_type, node.version, node.name, node.inputs, node.outputs,
        {**node.attrs, "value": fill},
    )  # fmt: skip


def _arithmetic(
    node: Node,
    constants: Sequence[Array | None],
    found: Mapping[str, Elements],
    shape: tuple[int, ...],
) -> Elements:
    (place,) = (i for i, values in enumerate(constants) if values is None)
    x = found[node.inputs[place]].each(lambda part: np.broadcast_to(part, shape))
    other = constants[1 - place] if len(constants) > 1 else None
    number = np.asarray(0 if other is None else other, np.float64)
    sign = -1.0 if node.op_type == "Neg" or (node.op_type == "Sub" and place == 1) else 1.0
    factor, added = x.factor * sign, x.added * sign
    if node.op_type == "Mul":
        factor, added = factor * number, added * number
    elif node.op_type == "Div":
        factor, added = factor / number, added / number
    elif node.op_type == "Add" or (sign < 0 and other is not None):
        added = added + number
    elif node.op_type == "Sub":
        added = added - number
    return Elements(x.index, factor, added)


def _chosen(
    node: Node,
    constants: Sequence[Array | None],
    found: Mapping[str, Elements],
    shape: tuple[int, ...],
) -> Elements:
    """Where: zero in place of a number is that number times zero, of which its place is known."""
    condition = np.broadcast_to(np.asarray(constants[0], bool), shape)
    sides = []
    for place in (1, 2):
        values = constants[place]
        side = found[node.inputs[place]] if values is None else Elements.constant(values)
        sides.append(side.each(lambda part: np.broadcast_to(part, shape)))
    yes, no = sides
    result = Elements(
        np.where(condition, yes.index, no.index),
        np.where(condition, yes.factor, no.factor),
        np.where(condition, yes.added, no.added),
    )
    for mine, other, here in ((yes, no, condition), (no, yes, ~condition)):
        zero = here & (mine.index == _NOTHING) & (mine.added == 0)
        result = Elements(np.where(zero, other.index, result.index), result.factor, result.added)
    return result
