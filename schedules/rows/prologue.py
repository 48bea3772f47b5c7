"""How each prologue makes the values of a row, 16 at a time.

A prologue's code emits what has to be known of the whole row first (a norm's statistics), and
returns ``value(column, count)``: the 16 values from ``column`` on, lanes from ``count`` on zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.rows.op import GLUS, RowOp
from slmtvm.schedules.rows.pair import FARTHEST
from slmtvm.schedules.rows.rescale import COUNTED
from slmtvm.schedules.rows.statistics import inverse_rms, mean
from slmtvm.schedules.vector import Buffer, Expr

Value = Callable[[Expr, int], Expr]
Buffers = dict[str, Buffer]
Function = Callable[[Expr], Expr]
Numbers = Callable[[str], Expr]  # one of a row op's numbers, in every lane

# Long enough to keep the units busy alone; several at once would spill registers on NEON.
_LONG = (*GLUS, "swiglu", "pair", "rescale", "silu", "gelu_erf", "gelu_tanh", "sigmoid", "tanh")


def vectors_at_once(op: RowOp) -> int:
    """How many vectors of a row an epilogue should take in one round of its loop."""
    return 1 if op.prologue in _LONG else 4


def number_of(op: RowOp, buffers: Buffers, name: str) -> Expr:
    """The one of ``op.numbers`` that has this name, a float32 scalar."""
    return vec.load(buffers["numbers"], T.int32(list(op.numbers).index(name)), 1)


def _elementwise(function: Function) -> Callable[[RowOp, Expr, Buffers], Value]:
    def prologue(op: RowOp, row: Expr, buffers: Buffers) -> Value:
        def value(column: Expr, count: int) -> Expr:
            return function(vec.load_part(buffers["x"], row * op.d + column, count))

        return value

    return prologue


def _halves(op: RowOp, row: Expr, x: Buffer, column: Expr, count: int) -> tuple[Expr, Expr]:
    start = row * (2 * op.d) + column
    return vec.load_part(x, start, count), vec.load_part(x, start + op.d, count)


def _glu(function: Function) -> Callable[[RowOp, Expr, Buffers], Value]:
    def prologue(op: RowOp, row: Expr, buffers: Buffers) -> Value:
        def value(column: Expr, count: int) -> Expr:
            gate, up = _halves(op, row, buffers["x"], column, count)
            return T.bind(function(gate) * up)

        return value

    return prologue


def _swiglu(op: RowOp, row: Expr, buffers: Buffers) -> Value:
    alpha, beta, limit = (
        vec.splat(vec.load(buffers["constants"], T.int32(i), 1)) for i in range(3)
    )
    least = T.bind(-limit)

    def value(column: Expr, count: int) -> Expr:
        gate, up = _halves(op, row, buffers["x"], column, count)
        # The limits come first: what is no number stays so.
        gate = T.bind(vec.minimum(limit, gate))
        up = T.bind(vec.maximum(least, T.bind(vec.minimum(limit, up))))
        gated = T.bind(gate * vec.sigmoid(T.bind(alpha * gate)))
        # Lanes behind the row stay zero: their gate is.
        return T.bind(gated * T.bind(up + beta))

    return value


def _pair(op: RowOp, row: Expr, buffers: Buffers) -> Value:
    pair, single = op.pair, None
    assert pair is not None

    def number(name: str) -> Expr:
        return vec.splat(number_of(op, buffers, name))

    if op.other == "number":
        single = vec.splat(vec.load(buffers["other"], row, 1))
    of_x, of_y = number("x_reciprocal"), number("y_reciprocal")
    scale, zero = number("result_scale"), number("result_zero")
    ideal = _product(number) if pair.function == "multiply" else _sum(number, first=pair.first)

    def value(column: Expr, count: int) -> Expr:
        x = vec.load_part(buffers["x"], row * op.d + column, count)
        other = single
        if other is None:
            start = column if op.other == "features" else row * op.d + column
            other = vec.load_part(buffers["other"], start, count)
        # Both are whole numbers of steps but for their own roundings.
        counts = (vec.nearest_product(v, r) for v, r in ((x, of_x), (other, of_y)))
        steps = T.bind(vec.nearest(ideal(*counts)) - zero)
        return vec.keep_part(T.bind(steps * scale), count)

    return value


def _sum(number: Numbers, *, first: bool) -> Callable[[Expr, Expr], Expr]:
    """``Pair`` for a sum of numbers of steps; ``first``: x is added last."""
    x_factor, y_factor, offset = number("x_factor"), number("y_factor"), number("offset")
    x_zero, y_zero = number("x_zero"), number("y_zero")

    def ideal(x: Expr, y: Expr) -> Expr:
        a, b = (T.bind(x + x_zero), x_factor), (T.bind(y + y_zero), y_factor)
        if not first:
            a, b = b, a
        return _clipped(vec.fma(*a, vec.fma(*b, offset)))

    return ideal


def _product(number: Numbers) -> Callable[[Expr, Expr], Expr]:
    """``Pair`` for a product of numbers of steps."""
    factor, zero = number("factor"), number("result_zero")

    def ideal(x: Expr, y: Expr) -> Expr:
        # Clipped between product and sum, which must not become one operation.
        return T.bind(_clipped(T.bind(T.bind(x * y) * factor)) + zero)

    return ideal


def _clipped(steps: Expr) -> Expr:
    return vec.clamped(steps, -FARTHEST, FARTHEST)


def _rescale(op: RowOp, row: Expr, buffers: Buffers) -> Value:
    unit = vec.splat(number_of(op, buffers, "unit"))

    def value(column: Expr, count: int) -> Expr:
        steps = vec.load_part(buffers["steps"], column, count)
        ratio = T.bind(vec.load_part(buffers["x"], row * op.d + column, count) / steps)
        few = vec.absolute(ratio) < vec.splat(COUNTED)
        counted = T.bind(T.Select(few, vec.nearest(ratio), ratio))
        ideal = _clipped(T.bind(counted * T.bind(steps / unit)))
        return vec.keep_part(T.bind(vec.nearest(ideal) * unit), count)

    return value


def _silu(x: Expr) -> Expr:
    return T.bind(x * vec.sigmoid(x))


def _sigmoid(op: RowOp, row: Expr, buffers: Buffers) -> Value:
    def value(column: Expr, count: int) -> Expr:
        x = vec.load_part(buffers["x"], row * op.d + column, count)
        return vec.keep_part(vec.sigmoid(x), count)  # of 0 it is not 0

    return value


def _relu(x: Expr) -> Expr:
    zero = vec.splat(0.0)
    return T.bind(T.Select(x <= zero, zero, x))  # what is no number stays so


def _gelu_erf(x: Expr) -> Expr:
    half = T.bind(x * vec.splat(0.5))
    return vec.fma(half, vec.erf(T.bind(x * vec.splat(math.sqrt(0.5)))), half)


def _gelu_tanh(x: Expr) -> Expr:
    # (1 + tanh(u)) / 2 is sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x**3).
    twice = 2.0 * math.sqrt(2.0 / math.pi)
    square = T.bind(x * x)
    factor = vec.fma(square, vec.splat(twice * 0.044715), vec.splat(twice))
    return T.bind(x * vec.sigmoid(T.bind(x * factor)))


def _norm_input(op: RowOp, row: Expr, buffers: Buffers) -> tuple[Value, Value]:
    """How a norm's first pass and its later ones read the row; the first stores a residual sum."""

    def read(name: str) -> Value:
        return lambda column, count: vec.load_part(buffers[name], row * op.d + column, count)

    if not op.residual:
        return read("x"), read("x")

    def add_residual(column: Expr, count: int) -> Expr:
        total = T.bind(read("x")(column, count) + read("residual")(column, count))
        vec.store_part(buffers["sum"], row * op.d + column, total, count)
        return total

    return add_residual, read("sum")


Statistics = tuple[Expr, ...]


def _rms_statistics(op: RowOp, first: Value, _again: Value) -> Statistics:
    return (inverse_rms(op.d, first, op.eps),)


def _rms_value(op: RowOp, buffers: Buffers, read: Value, statistics: Statistics) -> Value:
    inverse = vec.splat(statistics[0])

    def value(column: Expr, count: int) -> Expr:
        gamma = vec.load_part(buffers["gamma"], column, count)
        return T.bind(T.bind(read(column, count) * inverse) * gamma)

    return value


def _layer_statistics(op: RowOp, first: Value, again: Value) -> Statistics:
    centre = mean(op.d, lambda s, column, count: T.bind(s + first(column, count)), 0.0)
    everywhere = vec.splat(centre)

    def centred(column: Expr, count: int) -> Expr:
        return vec.keep_part(T.bind(again(column, count) - everywhere), count)

    return inverse_rms(op.d, centred, op.eps), centre


def _layer_value(op: RowOp, buffers: Buffers, read: Value, statistics: Statistics) -> Value:
    inverse, centre = (vec.splat(s) for s in statistics)

    def value(column: Expr, count: int) -> Expr:
        scaled = T.bind(T.bind(read(column, count) - centre) * inverse)
        gamma = vec.load_part(buffers["gamma"], column, count)
        return vec.fma(scaled, gamma, vec.load_part(buffers["beta"], column, count))

    return value


_NORMS = {
    "rms_norm": (_rms_statistics, _rms_value),
    "layer_norm": (_layer_statistics, _layer_value),
}


def norm_statistics(op: RowOp, row: Expr, buffers: Buffers) -> Statistics:
    """What a norm has to know of a whole row: 1 / deviation, and of layer_norm the mean."""
    return _NORMS[op.prologue][0](op, *_norm_input(op, row, buffers))


def norm_value(op: RowOp, row: Expr, buffers: Buffers, statistics: Statistics) -> Value:
    """The normed values of a row of these ``statistics``."""
    return _NORMS[op.prologue][1](op, buffers, _norm_input(op, row, buffers)[1], statistics)


def _norm(op: RowOp, row: Expr, buffers: Buffers) -> Value:
    return norm_value(op, row, buffers, norm_statistics(op, row, buffers))


FUNCTIONS: dict[str, Function] = {
    "silu": _silu,
    "relu": _relu,
    "gelu_erf": _gelu_erf,
    "gelu_tanh": _gelu_tanh,
    "tanh": vec.tanh,
}
"""Activations that are 0 of 0."""

PROLOGUE_CODE: dict[str, Callable[[RowOp, Expr, Buffers], Value]] = {
    "copy": _elementwise(lambda x: x),
    **{name: _elementwise(function) for name, function in FUNCTIONS.items()},
    "sigmoid": _sigmoid,
    "silu_glu": _glu(_silu),
    "relu_glu": _glu(_relu),
    "gelu_erf_glu": _glu(_gelu_erf),
    "gelu_tanh_glu": _glu(_gelu_tanh),
    "sigmoid_glu": _glu(vec.sigmoid),
    "tanh_glu": _glu(vec.tanh),
    "swiglu": _swiglu,
    "pair": _pair,
    "rescale": _rescale,
    "rms_norm": _norm,
    "layer_norm": _norm,
}
