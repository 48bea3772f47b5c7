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
from slmtvm.schedules.rows.pair import FARTHEST, Pair
from slmtvm.schedules.rows.rescale import COUNTED
from slmtvm.schedules.rows.statistics import inverse_rms, mean
from slmtvm.schedules.vector import LANES, Buffer, Expr

Value = Callable[[Expr, int], Expr]
Buffers = dict[str, Buffer]
Function = Callable[[Expr], Expr]

# Long enough to keep the units busy alone; several at once would spill registers on NEON.
_LONG = (*GLUS, "swiglu", "pair", "rescale", "silu", "gelu_erf", "gelu_tanh", "sigmoid")


def vectors_at_once(op: RowOp) -> int:
    """How many vectors of a row an epilogue should take in one round of its loop."""
    return 1 if op.prologue in _LONG else 4


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
    pair, number = op.pair, None
    assert pair is not None
    if op.other == "number":
        number = vec.splat(vec.load(buffers["other"], row, 1))

    def value(column: Expr, count: int) -> Expr:
        x = vec.load_part(buffers["x"], row * op.d + column, count)
        other = number
        if other is None:
            start = column if op.other == "features" else row * op.d + column
            other = vec.load_part(buffers["other"], start, count)
        result = _PAIRS[pair.function](pair, _steps(x, pair.x_scale), _steps(other, pair.y_scale))
        return vec.keep_part(result, count)

    return value


def _steps(x: Expr, scale: float) -> Expr:
    """How many steps x is; it is a whole number of them but for its own rounding."""
    return vec.round_product_to_int(x, vec.splat(1.0 / scale))


def _float_of(steps: Expr, zero: int) -> Expr:
    return T.bind(T.cast(T.bind(steps + vec.splat_int(zero)), f"float32x{LANES}"))


def _sum(pair: Pair, x: Expr, y: Expr) -> Expr:
    of_x, of_y = (vec.splat(float(factor)) for factor in pair.factors)
    a, b = (_float_of(x, pair.x_zero), of_x), (_float_of(y, pair.y_zero), of_y)
    if not pair.first:
        a, b = b, a
    total = _clipped(vec.fma(*a, vec.fma(*b, vec.splat(float(pair.offset)))))
    return _restored(total, pair.scale, pair.zero)


def _product(pair: Pair, x: Expr, y: Expr) -> Expr:
    product = T.bind(_float_of(x, 0) * _float_of(y, 0))
    # Clipped between product and sum, which must not become one operation.
    scaled = _clipped(T.bind(product * vec.splat(float(pair.factor))))
    ideal = T.bind(scaled + vec.splat(float(pair.zero)))
    return _restored(ideal, pair.scale, pair.zero)


def _clipped(steps: Expr) -> Expr:
    above = T.bind(vec.maximum(steps, vec.splat(-FARTHEST)))
    return T.bind(vec.minimum(above, vec.splat(FARTHEST)))


def _restored(ideal: Expr, scale: float, zero: int) -> Expr:
    """The integer nearest to ``ideal`` as what it stands for."""
    return T.bind(_float_of(vec.round_to_int(ideal), -zero) * vec.splat(scale))


def _rescale(op: RowOp, row: Expr, buffers: Buffers) -> Value:
    def value(column: Expr, count: int) -> Expr:
        steps = vec.load_part(buffers["steps"], column, count)
        ratio = T.bind(vec.load_part(buffers["x"], row * op.d + column, count) / steps)
        few = vec.absolute(ratio) < vec.splat(COUNTED)
        counted = T.bind(T.Select(few, _float_of(vec.round_to_int(ratio), 0), ratio))
        ideal = _clipped(T.bind(counted * T.bind(steps / vec.splat(op.unit))))
        return vec.keep_part(_restored(ideal, op.unit, 0), count)

    return value


_PAIRS: dict[str, Callable[[Pair, Expr, Expr], Expr]] = {"add": _sum, "multiply": _product}


def _silu(x: Expr) -> Expr:
    return T.bind(x * vec.sigmoid(x))


def _sigmoid(op: RowOp, row: Expr, buffers: Buffers) -> Value:
    def value(column: Expr, count: int) -> Expr:
        x = vec.load_part(buffers["x"], row * op.d + column, count)
        return vec.keep_part(vec.sigmoid(x), count)  # of 0 it is not 0

    return value


def _relu(x: Expr) -> Expr:
    return T.bind(vec.maximum(x, vec.splat(0.0)))


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


def _rms_norm(op: RowOp, row: Expr, buffers: Buffers) -> Value:
    first, again = _norm_input(op, row, buffers)

    inverse = inverse_rms(op.d, first, op.eps)

    def value(column: Expr, count: int) -> Expr:
        gamma = vec.load_part(buffers["gamma"], column, count)
        return T.bind(T.bind(again(column, count) * inverse) * gamma)

    return value


def _layer_norm(op: RowOp, row: Expr, buffers: Buffers) -> Value:
    first, again = _norm_input(op, row, buffers)
    centre = vec.splat(mean(op.d, lambda s, column, count: T.bind(s + first(column, count)), 0.0))

    def centred(column: Expr, count: int) -> Expr:
        return T.bind(again(column, count) - centre)

    inverse = inverse_rms(op.d, lambda at, count: vec.keep_part(centred(at, count), count), op.eps)

    def value(column: Expr, count: int) -> Expr:
        scaled = T.bind(centred(column, count) * inverse)
        gamma = vec.load_part(buffers["gamma"], column, count)
        return vec.fma(scaled, gamma, vec.load_part(buffers["beta"], column, count))

    return value


FUNCTIONS: dict[str, Function] = {
    "silu": _silu,
    "relu": _relu,
    "gelu_erf": _gelu_erf,
    "gelu_tanh": _gelu_tanh,
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
    "swiglu": _swiglu,
    "pair": _pair,
    "rescale": _rescale,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
}
