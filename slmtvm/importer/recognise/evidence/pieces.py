"""What numbers that were tried say about a part of a graph, and what they do not.

A recogniser computes a part of a graph on numbers and compares with a function that is known. Where
every operator is smooth, two functions that agree on some numbers agree on all. An operator by
pieces (Clip, Max, Where, Abs) may do on other numbers what it did on none of those. So each of its
pieces must be one that was tried, or one that no finite number reaches; an operator in steps
(Round, a cast to integers) is accounted for by no numbers. Whoever recognises anything by numbers
asks this module: ``is_linear`` where unit vectors show all, ``is_algebraic`` where a few sizes do,
and otherwise an ``Account`` of what was computed on ``probing_numbers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.operators.elementwise import FLOAT_TYPES, cast_dtype
from slmtvm.importer.recognise.evidence.ranges import Range, constants_in, range_of, ranges_of
from slmtvm.importer.recognise.evidence.regions import ROUNDING, constants_of
from slmtvm.importer.rewrite.halves import is_half

_LINEAR = ("Add", "Dropout", "Mean", "Neg", "Sub", "Sum")
_LOGICAL = ("And", "Not", "Or", "Xor")  # of tests, which are by pieces themselves
_ARITHMETIC = (*_LINEAR, "Div", "Mul", "Pow", "Reciprocal", "Sqrt")
_SMOOTH = (
    *_ARITHMETIC, *_LOGICAL, "Cos", "Erf", "Exp", "Gelu", "Log", "Mish", "Sigmoid", "Sin",
    "Softplus", "Swish", "Tan", "Tanh",
)  # fmt: skip
_ALGEBRAIC = (
    *_ARITHMETIC, "LayerNormalization", "LpNormalization", "RMSNormalization", "ReduceL2",
    "ReduceMean", "ReduceSum", "ReduceSumSquare", "SimplifiedLayerNormalization",
)  # fmt: skip
_CURVED = ("Elu", "HardSwish")  # by pieces of which one is not linear

_Pairs = Callable[..., list[tuple[Any, Any]]]
"""From attributes and inputs, arrays or ranges, what an operator tells its pieces apart by: one of
each pair is smaller than the other."""
_Side = tuple[int, bool]
"""Of a pair: whether its first is the smaller one."""
_EXACT: _Side = (-1, True)
"""All inputs were integers, which come from tests or from a choice that recognisers compare; or a
Cast kept its numbers."""


def _at_zero(_attrs: Mapping[str, Any], x: Any, *_rest: Any) -> list[tuple[Any, Any]]:
    return [(x, 0.0)]


def _at_bounds(attrs: Mapping[str, Any], x: Any, *bounds: Any) -> list[tuple[Any, Any]]:
    given = [*bounds, None, None][:2]
    ends = [attrs.get(name, bound) for name, bound in zip(("min", "max"), given, strict=True)]
    return [(x, end) for end in ends if end is not None]


def _at_ramp(attrs: Mapping[str, Any], x: Any) -> list[tuple[Any, Any]]:
    """A ramp from 0 to 1 of ``alpha * x + beta``."""
    alpha, beta = attrs.get("alpha", 0.2), attrs.get("beta", 0.5)
    return [(x, (end - beta) / alpha) for end in (0.0, 1.0)] if alpha else []


def _between_operands(_attrs: Mapping[str, Any], *x: Any) -> list[tuple[Any, Any]]:
    return [(a, b) for i, a in enumerate(x) for b in x[:i]]


_PIECES: dict[str, _Pairs] = {
    "Abs": _at_zero,
    "Clip": _at_bounds,
    "Elu": _at_zero,
    "Greater": _between_operands,
    "GreaterOrEqual": _between_operands,
    "HardSigmoid": _at_ramp,
    "HardSwish": lambda attrs, x: [(x, -3.0), (x, 3.0)],
    "LeakyRelu": _at_zero,
    "Less": _between_operands,
    "LessOrEqual": _between_operands,
    "Max": _between_operands,
    "Min": _between_operands,
    "PRelu": _at_zero,
    "Relu": _at_zero,
    "Softsign": _at_zero,
    "Where": lambda attrs, condition, *x: [(condition, 0.5)],
}


def is_linear(frozen: Frozen, nodes: Sequence[Node], given: Mapping[str, Range]) -> bool:
    """Whether ``nodes`` are sums, products with constants, moves, and guards that never act.

    What they compute is then linear, up to a constant, wherever ``given`` values lie in their
    ranges. Roundings pass, as ``regions.evaluate`` has them.
    """
    ranges = ranges_of(frozen, nodes, given)
    return all(linear_node(frozen, node, ranges) for node in nodes)


def linear_node(frozen: Frozen, node: Node, ranges: Mapping[str, Range] | None = None) -> bool:
    """Whether ``node`` is linear, up to a constant, in what depends on the tokens; without
    ``ranges`` no guard is."""
    kind, fixed = operator_of(node).kind, [name in frozen.constants for name in node.inputs]
    if kind is Kind.MOVE:
        return not frozen.is_lookup(node)
    if node.op_type in ROUNDING or node.op_type in _LINEAR:
        return True
    if node.op_type == "Mul":
        return any(fixed)
    if (node.op_type == "Div" and fixed[1]) or (node.op_type == "Where" and fixed[0]):
        return True
    if node.op_type == "Cast":
        return _keeps_numbers(frozen, node)
    if ranges is None or kind is not Kind.ELEMENTWISE or node.op_type in _CURVED:
        return False
    return _is_settled(frozen, node, ranges)


def is_algebraic(frozen: Frozen, nodes: Sequence[Node], given: Mapping[str, Range]) -> bool:
    """Whether ``nodes`` are arithmetic, powers and roots of elements and of sums along lines, moves
    and guards that never act wherever ``given`` values lie in their ranges."""
    ranges = ranges_of(frozen, nodes, given)
    return all(
        operator_of(node).kind is Kind.MOVE
        or node.op_type in _ALGEBRAIC
        or (node.op_type == "Cast" and _keeps_numbers(frozen, node))
        or _is_settled(frozen, node, ranges)
        for node in nodes
    )


class Account:
    """Which pieces of ``nodes`` were tried, of those that ``given`` ranges allow."""

    def __init__(self, frozen: Frozen, nodes: Sequence[Node], given: Mapping[str, Range]) -> None:
        self._frozen, self._ranges = frozen, ranges_of(frozen, nodes, given)
        self._by_pieces = [
            node
            for node in nodes
            if operator_of(node).kind is Kind.ELEMENTWISE
            and node.op_type not in ROUNDING
            and not _is_smooth(frozen, node)
            and not _is_settled(frozen, node, self._ranges)
        ]
        self._tried: dict[str, set[_Side]] = {n.outputs[0]: set() for n in self._by_pieces}

    def see(self, values: Mapping[str, Array]) -> None:
        """Count what the nodes computed in ``values``, which a recogniser has compared."""
        for node in self._by_pieces:
            self._tried[node.outputs[0]] |= _sides_tried(self._frozen, node, values)

    @property
    def suspect(self) -> Node | None:
        """The first node that computes single elements by pieces or in steps, or None."""
        return next(iter(self._by_pieces), None)

    @property
    def missing(self) -> Node | None:
        """The first node that may do more to single elements than what was seen, or None."""
        for node in self._by_pieces:
            needed = _sides_possible(self._frozen, node, self._ranges)
            found = self._tried[node.outputs[0]]
            if _EXACT not in found and (needed is None or needed - found):
                return node
        return None


def _is_smooth(frozen: Frozen, node: Node) -> bool:
    if node.op_type == "Cast":
        return _keeps_numbers(frozen, node)
    return node.op_type in _SMOOTH


def _keeps_numbers(frozen: Frozen, node: Node) -> bool:
    """Whether a Cast keeps numbers as they are; the precision of floats apart."""
    before = frozen.dtypes.get(node.inputs[0])
    if before is None or before.kind == "b":
        return False
    if before.kind in "iu":
        return node.attrs["to"] in FLOAT_TYPES or cast_dtype(node.attrs).kind in "iu"
    return node.attrs["to"] in FLOAT_TYPES


def _is_settled(frozen: Frozen, node: Node, ranges: Mapping[str, Range]) -> bool:
    """Whether ``node`` always gives one number, or computes by one and the same piece."""
    if ranges[node.outputs[0]].constant:
        return True
    needed = _sides_possible(frozen, node, ranges)
    return needed is not None and len(needed) == len({pair for pair, _ in needed})


def _sides_possible(frozen: Frozen, node: Node, ranges: Mapping[str, Range]) -> set[_Side] | None:
    """Which sides the ranges allow; None for an operator in steps."""
    if node.op_type not in _PIECES:
        return None
    given = [range_of(frozen, ranges, name) if name else None for name in node.inputs]
    found: set[_Side] = set()
    for place, pair in enumerate(_PIECES[node.op_type](node.attrs, *given)):
        a, b = (x if isinstance(x, Range) else Range(float(x), float(x)) for x in pair)
        found |= {(place, True)} if a.low < b.high else set()
        found |= {(place, False)} if b.low < a.high else set()
    return found


def _sides_tried(frozen: Frozen, node: Node, values: Mapping[str, Array]) -> set[_Side]:
    """The sides that ``node`` took; none where it was not computed."""
    inputs: list[Array | None] = []
    for name in node.inputs:
        constant = frozen.constants.get(name)
        computed = values.get(name)
        if name and constant is None and computed is None:
            return set()
        inputs.append(constant.values(table=True) if computed is None and constant else computed)
    found: set[_Side] = set()
    kinds = {i.dtype.kind for i in inputs if i is not None}
    floats = node.op_type == "Cast" and node.attrs["to"] in FLOAT_TYPES
    if "f" not in kinds or (floats and kinds == {"f"}):
        found.add(_EXACT)
    if node.op_type in _PIECES:
        for place, (a, b) in enumerate(_PIECES[node.op_type](node.attrs, *inputs)):
            found |= {(place, True)} if np.less(a, b).any() else set()
            found |= {(place, False)} if np.less(b, a).any() else set()
    return found


# Decimal orders of the smallest and the largest numbers that are tried, and of those where
# activations mostly are; in float16 less than what overflows, where clamps stand.
_SMALLEST, _LARGEST, _LARGEST_16_BITS = -30.0, 30.0, 3.5
_NEAR = (-3.0, 5.0)
_PER_ORDER, _PER_NEAR_ORDER = 3, 16
_BESIDE = (0.5, 1 - 1e-3, 1.0, 1 + 1e-3, 2.0)  # times a number that a graph holds


def probing_numbers(frozen: Frozen, nodes: Sequence[Node]) -> Array:
    """Numbers, float64 (n,), at which ``nodes`` show what they do to single elements.

    Zero, both signs of small and large ones, close to each other where activations mostly are, and
    both sides of all that the graph itself holds, and between these.
    """
    halves = any(is_half(c.dtype) or is_half(c.stored.dtype) for c in constants_of(frozen, nodes))
    last = _LARGEST_16_BITS if halves else _LARGEST
    near = (_NEAR[0], min(_NEAR[1], last))
    own = np.unique(np.abs(constants_in(frozen, nodes) or [1.0]))
    sizes = np.concatenate(
        [
            _spaced(_SMALLEST, last, _PER_ORDER),
            _spaced(*near, _PER_NEAR_ORDER),
            np.outer(own, _BESIDE).reshape(-1),
            (own[1:] + own[:-1]) / 2,
        ]
    )
    sizes = np.unique(sizes[sizes <= 10.0**last])
    return np.concatenate([sizes, -sizes[sizes > 0], [0.0]])


def _spaced(first: float, last: float, per_order: int) -> Array:
    return np.logspace(first, last, int((last - first) * per_order))


def in_arrays(numbers: Array, shape: tuple[int, ...]) -> Iterator[Array]:
    """Arrays of ``shape`` that hold all ``numbers`` together, some of them several times."""
    size = int(np.prod(shape))
    for start in range(0, numbers.size, size):
        yield np.resize(np.roll(numbers, -start), size).reshape(shape)
