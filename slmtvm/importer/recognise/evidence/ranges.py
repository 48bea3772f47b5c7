"""Between which numbers the values of a part of a graph lie, whatever finite numbers it is given.

Coarse on purpose: one range for all elements of a value. That is enough to show what matters, that
a guard never acts: a variance is not negative, a softmax stays within 0 and 1, and what comes in is
finite, since a file that computes infinities or NaN gives nothing to agree with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.graph import EXPAND_LIMIT, Constant, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.operators.elementwise import FLOAT_TYPES
from slmtvm.importer.recognise.evidence.regions import ROUNDING
from slmtvm.importer.rewrite.halves import is_half

_LARGEST = float(np.finfo(np.float32).max)
# Half precision is computed in float32. What lies beyond is infinite in the file's own type, so
# that a bound there (65504, or 1000 less as T5 has it) only undoes an overflow that does not occur.
_NEARLY_INFINITE = 64000.0


@dataclass(frozen=True)
class Range:
    """From ``low`` to ``high``, both included; ``nan``: or no number. Booleans are 0 and 1."""

    low: float
    high: float
    nan: bool = False

    @property
    def constant(self) -> bool:
        return self.low == self.high and not self.nan

    @property
    def finite(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high) and not self.nan

    def joined(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high), self.nan or other.nan)


ANY = Range(-math.inf, math.inf, nan=True)
FINITE = Range(-_LARGEST, _LARGEST)
SHARES = Range(0.0, 1.0)  # what a softmax gives where a row sees anything
_TEST = Range(0.0, 1.0)
_NO_LOW, _NO_HIGH = Range(-math.inf, -math.inf), Range(math.inf, math.inf)
_Function = Callable[..., Range]


def ranges_of(
    frozen: Frozen, nodes: Sequence[Node], given: Mapping[str, Range]
) -> dict[str, Range]:
    """The ranges of ``given`` values and of all that ``nodes`` compute from them."""
    found = dict(given)
    for node in nodes:
        function, result = _function(node), ANY
        if function is not None:
            inputs = [
                # Optional inputs that are left out are bounds: of a Clip, the second and the third.
                range_of(frozen, found, name) if name else (_NO_HIGH, _NO_LOW)[place % 2]
                for place, name in enumerate(node.inputs)
            ]
            result = _rounded(function(node, *inputs))
        for place, name in enumerate(node.outputs):
            found[name] = result if place == 0 or node.op_type == "Split" else ANY
    return found


def range_of(frozen: Frozen, found: Mapping[str, Range], name: str) -> Range:
    """The range of a value among ``found``, or of a constant."""
    known = found.get(name)
    if known is not None:
        return known
    constant = frozen.constants.get(name)
    return ANY if constant is None else _of_constant(constant)


def _of_constant(constant: Constant) -> Range:
    if not 0 < math.prod(constant.shape) <= EXPAND_LIMIT:
        return ANY
    with np.errstate(all="ignore"):
        values = constant.values().astype(np.float64)
    if np.isnan(values).any():
        return ANY
    low, high = float(values.min()), float(values.max())
    if is_half(constant.stored.dtype) or is_half(constant.dtype):
        low, high = (
            math.copysign(math.inf, v) if abs(v) >= _NEARLY_INFINITE else v for v in (low, high)
        )
    return Range(low, high)


def _rounded(found: Range) -> Range:
    """``found`` as float32 holds it: infinite where it is larger than the largest number."""
    low = -math.inf if found.low < -_LARGEST else found.low
    high = math.inf if found.high > _LARGEST else found.high
    return Range(low, high, found.nan)


def _function(node: Node) -> _Function | None:
    kind = operator_of(node).kind
    if node.op_type in ROUNDING:
        return lambda _, x, *rest: x  # as ``regions.evaluate`` has it
    if kind is Kind.MOVE:
        return _concat if operator_of(node).data is None else lambda _, x, *rest: x
    return _FUNCTIONS.get(node.op_type)


def _concat(_node: Node, *x: Range) -> Range:
    return _fold(Range.joined, x)


def _fold(join: Callable[[Range, Range], Range], x: Sequence[Range]) -> Range:
    result = x[0]
    for other in x[1:]:
        result = join(result, other)
    return result


def _corners(a: Range, b: Range, compute: Callable[[float, float], float]) -> Range:
    """The range of a function that is largest and smallest at ends of its operands' ranges."""
    ends = [_safely(compute, x, y) for x, y in product((a.low, a.high), (b.low, b.high))]
    if a.nan or b.nan or any(math.isnan(e) for e in ends):
        return ANY
    return Range(min(ends), max(ends))


def _safely(compute: Callable[[float, float], float], a: float, b: float) -> float:
    with np.errstate(all="ignore"):
        return float(compute(np.float64(a), np.float64(b)))


def _mul(node: Node, a: Range, b: Range) -> Range:
    if node.inputs[0] == node.inputs[1]:
        return _square(a)
    return _corners(a, b, lambda x, y: x * y)


def _square(a: Range) -> Range:
    ends = [x * x for x in (a.low, a.high)]
    return Range(0.0 if a.low <= 0 <= a.high else min(ends), max(ends), a.nan)


def _div(_node: Node, a: Range, b: Range) -> Range:
    return ANY if b.low <= 0 <= b.high else _corners(a, b, lambda x, y: x / y)


def _pow(_node: Node, a: Range, b: Range) -> Range:
    if not b.constant:
        return ANY
    if b.low == 2.0:
        return _square(a)
    if a.low < 0 or (a.low == 0 and b.low < 0):
        even = b.low > 0 and b.low % 2 == 0
        return Range(0.0, math.inf, a.nan) if even else ANY
    return _corners(a, b, lambda x, y: x**y)


def _rising(compute: Callable[[float], float], low: float = -math.inf) -> _Function:
    """A function that only rises, of numbers from ``low`` on."""

    def apply(_node: Node, a: Range) -> Range:
        if a.low < low:
            return ANY
        with np.errstate(all="ignore"):
            ends = [float(compute(np.float64(x))) for x in (a.low, a.high)]
        return Range(ends[0], ends[1], a.nan)

    return apply


def _within(low: float, high: float) -> _Function:
    return lambda _, a, *rest: Range(low, high, a.nan)


def _clip(node: Node, x: Range, low: Range = _NO_LOW, high: Range = _NO_HIGH) -> Range:
    if "min" in node.attrs:
        low = Range(node.attrs["min"], node.attrs["min"])
    if "max" in node.attrs:
        high = Range(node.attrs["max"], node.attrs["max"])
    return _smaller(_larger(x, low), high)


def _larger(a: Range, b: Range) -> Range:
    return Range(max(a.low, b.low), max(a.high, b.high), a.nan or b.nan)


def _smaller(a: Range, b: Range) -> Range:
    return Range(min(a.low, b.low), min(a.high, b.high), a.nan or b.nan)


def _where(_node: Node, condition: Range, a: Range, b: Range) -> Range:
    if condition.constant:
        return a if condition.low else b
    return a.joined(b)


def _cast(node: Node, a: Range) -> Range:
    return (
        a if node.attrs["to"] in FLOAT_TYPES or (a.low >= 0 and a.high <= 1 and a.constant) else ANY
    )


def _less(_node: Node, a: Range, b: Range) -> Range:
    if a.nan or b.nan:
        return _TEST
    if a.high < b.low:
        return Range(1.0, 1.0)
    return Range(0.0, 0.0) if a.low >= b.high else _TEST


def _not(_node: Node, a: Range) -> Range:
    return Range(1 - a.high, 1 - a.low)


def _sum_of_lines(_node: Node, a: Range, *_rest: Range) -> Range:
    if a.low >= 0:
        return Range(a.low, math.inf, a.nan)
    return Range(-math.inf, math.inf, a.nan or (math.isinf(a.low) and math.isinf(a.high)))


_FUNCTIONS: dict[str, _Function] = {
    "Abs": lambda _, a: Range(
        0.0 if a.low <= 0 <= a.high else min(abs(a.low), abs(a.high)),
        max(abs(a.low), abs(a.high)), a.nan,
    ),
    "Add": lambda _, a, b: _corners(a, b, lambda x, y: x + y),
    "And": lambda _, a, b: _smaller(a, b),
    "Cast": _cast,
    "Clip": _clip,
    "Div": _div,
    "Dropout": lambda _, a, *rest: a,
    "Erf": _within(-1.0, 1.0),
    "Exp": _rising(np.exp),
    "Greater": lambda node, a, b: _less(node, b, a),
    "GreaterOrEqual": lambda node, a, b: _not(node, _less(node, a, b)),
    "IsInf": lambda _, a: Range(0.0, 0.0) if a.finite else _TEST,
    "IsNaN": lambda _, a: _TEST if a.nan else Range(0.0, 0.0),
    "Less": _less,
    "LessOrEqual": lambda node, a, b: _not(node, _less(node, b, a)),
    "Max": lambda _, *x: _fold(_larger, x),
    "Min": lambda _, *x: _fold(_smaller, x),
    "Mul": _mul,
    "Neg": lambda _, a: Range(-a.high, -a.low, a.nan),
    "Not": _not,
    "Or": lambda _, a, b: _larger(a, b),
    "Pow": _pow,
    "Reciprocal": lambda node, a: _div(node, Range(1.0, 1.0), a),
    "ReduceL1": lambda _, a, *rest: Range(0.0, math.inf, a.nan),
    "ReduceL2": lambda _, a, *rest: Range(0.0, math.inf, a.nan),
    "ReduceMax": lambda _, a, *rest: a,
    "ReduceMean": lambda _, a, *rest: a,
    "ReduceMin": lambda _, a, *rest: a,
    "ReduceSum": _sum_of_lines,
    "ReduceSumSquare": lambda _, a, *rest: Range(0.0, math.inf, a.nan),
    "Relu": lambda _, a: _larger(a, Range(0.0, 0.0)),
    "Sigmoid": _within(0.0, 1.0),
    # A row of nothing but minus infinity has no softmax.
    "Softmax": lambda _, a: Range(0.0, 1.0, not a.finite),
    "Softplus": lambda _, a: Range(0.0, math.inf, a.nan),
    "Sqrt": _rising(np.sqrt, 0.0),
    "Sub": lambda _, a, b: _corners(a, b, lambda x, y: x - y),
    "Sum": lambda _, *x: _fold(lambda a, b: _corners(a, b, lambda x, y: x + y), x),
    "Tanh": _within(-1.0, 1.0),
    "TopK": lambda _, a, *rest: a,
    "Where": _where,
}  # fmt: skip


def constants_in(frozen: Frozen, nodes: Sequence[Node]) -> list[float]:
    """The different single numbers among what ``nodes`` are given, attributes too."""
    numbers: dict[float, None] = {}
    for node in nodes:
        numbers.update(
            (float(v), None) for v in node.attrs.values() if isinstance(v, (float, np.floating))
        )
        for name in node.inputs:
            constant = frozen.constants.get(name)
            if constant is not None and constant.stored.size == 1 and constant.dtype.kind in "iufV":
                numbers[float(constant.values().reshape(-1)[0])] = None
    return [number for number in numbers if math.isfinite(number)]
