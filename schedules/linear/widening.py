"""Packed weights as float32 vectors: what kernels on float activations multiply by."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.isa.base import Buffer, Expr, let, load, prefetch, splat
from slmtvm.schedules.linear.knobs import Knobs, ahead
from slmtvm.schedules.linear.shape import LinearShape
from slmtvm.schedules.linear.tile import Tile


@dataclass(frozen=True)
class Float8:
    """How an 8-bit float becomes a float32: the bits of its mantissa, the bias of its exponent."""

    mantissa: int
    bias: int


FLOAT8 = {
    "e4m3fn": Float8(3, 7),
    "e4m3fnuz": Float8(3, 8),
    "e5m2": Float8(2, 15),
    "e5m2fnuz": Float8(2, 16),
}
_MANTISSA, _BIAS = 23, 127  # of float32


def values_of_a_load(shape: LinearShape, isa: Isa) -> int:
    """How many k of each channel one vector of packed bytes holds."""
    return isa.k_step * 8 // shape.bits


def fields(
    shape: LinearShape, tile: Tile, weight: Buffer, v: int, k: Expr, count: int, knobs: Knobs
) -> list[Expr]:
    """Vector ``v`` of the weights for ``k``, a multiple of ``values_of_a_load``, to ``k + count``,
    each as int32 with its bits where ``widened`` wants them."""
    isa, lanes = tile.isa, tile.isa.lanes
    panel_size = shape.stored_k * isa.panel
    if shape.bits > 8:
        return [
            _field16(weight, tile.panel(v) * panel_size + (k + i) * isa.panel + tile.lane(v), lanes)
            for i in range(count)
        ]
    per_load = values_of_a_load(shape, isa)
    distance = ahead(knobs, tile.vectors * panel_size // isa.vectors, 1)
    found: list[Expr] = []
    for first in range(0, count, per_load):
        offset = (k + first) * shape.bits // 8 * isa.panel + tile.lane(v) * isa.k_step
        at = tile.panel(v) * panel_size + offset
        if distance and v % isa.vectors == 0:
            prefetch(weight, at + distance)
        raw = load(weight, at, lanes * isa.k_step)
        dtype = f"int32x{lanes}"
        word = let(T.Cast(dtype, raw) if isa.k_step == 1 else T.reinterpret(dtype, raw))
        bytes_ = [(word, 8 * b) for b in range(isa.k_step)]
        shifts = [(w, s + part) for part in range(0, 8, shape.bits) for w, s in bytes_]
        found += [_field(shape, w, s, lanes) for w, s in shifts[: count - first]]
    return found


def _field16(weight: Buffer, at: Expr, lanes: int) -> Expr:
    return let(T.Cast(f"int32x{lanes}", load(weight, at, lanes)))


def _field(shape: LinearShape, word: Expr, shift: int, lanes: int) -> Expr:
    """The weight that begins at bit ``shift``: an int2's or int4's number, or a byte at the top of
    its lane."""
    if shape.bits < 8:
        moved = T.shift_right(word, splat(shift, "int32", lanes)) if shift else word
        return let(T.bitwise_and(moved, splat((1 << shape.bits) - 1, "int32", lanes)))
    return let(T.shift_left(word, splat(24 - shift, "int32", lanes)))


def widened(shape: LinearShape, lanes: int, field: Expr, zero: Expr | None) -> Expr:
    """A weight as float32, its zero point (int32, or float32 where it is so) taken off."""
    if shape.format in FLOAT8:
        return float8(FLOAT8[shape.format], field)
    if shape.format == "int8":
        field = let(T.shift_right(field, splat(24, "int32", lanes)))
    if zero is not None and not shape.float_zero_points:
        field = let(field - zero)
    value = let(T.Cast(f"float32x{lanes}", field))
    return let(value - zero) if shape.float_zero_points else value


def float8(kind: Float8, top: Expr) -> Expr:
    """A float8 at the top of an int32 as float32: exponent and mantissa put in their places; the
    product makes up for the other bias, and makes subnormals normal."""
    lanes = vec.lanes_of(top)
    shift = 24 - (_MANTISSA - kind.mantissa)
    kept = ((0x7F << (_MANTISSA - kind.mantissa)) | 1 << 31) - (1 << 32)  # as an int32
    placed = T.bitwise_and(
        T.shift_right(top, vec.splat_int(shift, lanes)), vec.splat_int(kept, lanes)
    )
    bits = let(placed)
    factor = vec.splat(2.0 ** (_BIAS - kind.bias), lanes)
    return let(T.reinterpret(vec.dtype_of("float32", lanes), bits) * factor)


def default_zero(shape: LinearShape, lanes: int) -> Expr | None:
    """What is taken off every weight of a layer without zero points, None where nothing is."""
    return splat(shape.default_zero, "int32", lanes) if shape.default_zero else None
