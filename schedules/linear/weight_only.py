"""Linear layers with int4, int8 or float8 weights on float32 activations, widened in registers.

``y = sum over groups g of fma(chain of fma(x[k], q[k] - z[g]) over the group, s[g], y)``, then
``+ bias + residual``. A layer without groups is one group. Weights are packed as the integer
kernels' are, so that a bundle's kernels of both kinds can share them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.isa.base import Buffer, Expr, let, load, prefetch, splat
from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.linear import grouped
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace, tile_knobs, tile_space
from slmtvm.schedules.linear.scheme import Weights
from slmtvm.schedules.linear.shape import LinearShape
from slmtvm.schedules.linear.tile import Registers, Store, Tile


@dataclass(frozen=True)
class _Float8:
    """How an 8-bit float becomes a float32: the bits of its mantissa, the bias of its exponent."""

    mantissa: int
    bias: int
    numpy: type


_FLOAT8 = {
    "e4m3fn": _Float8(3, 7, ml_dtypes.float8_e4m3fn),
    "e4m3fnuz": _Float8(3, 8, ml_dtypes.float8_e4m3fnuz),
    "e5m2": _Float8(2, 15, ml_dtypes.float8_e5m2),
    "e5m2fnuz": _Float8(2, 16, ml_dtypes.float8_e5m2fnuz),
}
_MANTISSA, _BIAS = 23, 127  # of float32


def activations(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """x float32 (m, k)."""
    return [Tensor("x", (shape.m, shape.k), "float32")]


def weight_tensors(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """As ``grouped`` has them; without groups, scales and zero points are (panels, 1,
    isa.panel)."""
    return grouped.weight_tensors(shape, isa)


def pack(shape: LinearShape, isa: Isa, weights: Weights) -> list[np.ndarray]:
    """As ``grouped`` takes them, a float8 weight as its type or as bytes; without groups, scales
    and zero points may be (n,)."""
    return grouped.pack(shape, isa, weights)


def emit(
    shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    size = shape.group_size or shape.k
    whole, rest = divmod(shape.k, size)
    sums = Registers("float32", tile.isa.lanes, tile.rows * tile.vectors)
    if whole == 1:
        _add_group(shape, tile, knobs, named, 0, size, sums)
    elif whole:
        with T.serial(whole) as group:
            _add_group(shape, tile, knobs, named, group, size, sums)
    if rest:
        _add_group(shape, tile, knobs, named, whole, rest, sums)
    for row, v in tile.cells():
        store.add_and_write(tile, row, v, sums[row * tile.vectors + v])


def _add_group(
    shape: LinearShape,
    tile: Tile,
    knobs: Knobs,
    named: Mapping[str, Buffer],
    group: Expr,
    count: int,
    sums: Registers,
) -> None:
    """Add ``count`` values of k from the first of ``group`` on to the tile's sums."""
    isa, lanes = tile.isa, tile.isa.lanes
    start = group * (shape.group_size or shape.k)

    def by_channel(name: str, v: int) -> Expr:
        at = (tile.panel(v) * shape.groups + group) * isa.panel + tile.lane(v)
        return load(named[name], at, lanes)

    zeros = [_zero_point(shape, isa, by_channel, v) for v in range(tile.vectors)]
    chains = Registers("float32", lanes, tile.rows * tile.vectors)

    def steps(k: Expr, number: int) -> None:
        columns = [
            _columns(shape, tile, named["weight"], v, k, number, knobs["pf"])
            for v in range(tile.vectors)
        ]
        for place in range(number):
            widened = [
                _widened(shape, isa, c[place], z) for c, z in zip(columns, zeros, strict=True)
            ]
            for row in range(tile.rows):
                a = let(T.Broadcast(named["x"][tile.row(row) * shape.k + k + place], lanes))
                for v, column in enumerate(widened):
                    index = row * tile.vectors + v
                    chains[index] = T.fma(a, column, chains[index])

    unroll = knobs["ku"]
    parts, left = divmod(count, unroll)
    if parts == 1:
        steps(start, unroll)
    elif parts:
        with T.serial(parts) as part:
            steps(start + part * unroll, unroll)
    if left:
        steps(start + parts * unroll, left)
    for v in range(tile.vectors):
        stored = by_channel("scales", v)
        scale = let(isa.f16_to_f32(stored) if shape.scale_dtype == "float16" else stored)
        for row in range(tile.rows):
            index = row * tile.vectors + v
            sums[index] = T.fma(chains[index], scale, sums[index])


def _columns(
    shape: LinearShape, tile: Tile, weight: Buffer, v: int, k: Expr, count: int, ahead: int
) -> list[Expr]:
    """Vector ``v`` of the weights for ``k`` to ``k + count``, each as int32 with its bits where
    ``_widened`` wants them."""
    isa, lanes = tile.isa, tile.isa.lanes
    panel_bytes = shape.padded_k * shape.bits // 8 * isa.panel
    per_load = isa.k_step * 8 // shape.bits
    found: list[Expr] = []
    for first in range(0, count, per_load):
        offset = (k + first) * shape.bits // 8 * isa.panel + tile.lane(v) * isa.k_step
        at = tile.panel(v) * panel_bytes + offset
        if ahead and v % isa.vectors == 0:
            prefetch(weight, at + tile.vectors * panel_bytes // isa.vectors)
        raw = load(weight, at, lanes * isa.k_step)
        dtype = f"int32x{lanes}"
        word = let(T.Cast(dtype, raw) if isa.k_step == 1 else T.reinterpret(dtype, raw))
        bytes_ = [(word, 8 * b) for b in range(isa.k_step)]
        shifts = [(w, s + half) for half in (0, 4)[: 8 // shape.bits] for w, s in bytes_]
        found += [_field(shape, w, s, lanes) for w, s in shifts[: count - first]]
    return found


def _field(shape: LinearShape, word: Expr, shift: int, lanes: int) -> Expr:
    """The weight that begins at bit ``shift``: an int4's number, a byte at the top of its lane."""
    if shape.format == "int4":
        moved = T.shift_right(word, splat(shift, "int32", lanes)) if shift else word
        return let(T.bitwise_and(moved, splat(15, "int32", lanes)))
    return let(T.shift_left(word, splat(24 - shift, "int32", lanes)))


def _widened(shape: LinearShape, isa: Isa, field: Expr, zero: Expr | None) -> Expr:
    """A weight as float32, its zero point taken off."""
    lanes = isa.lanes
    if shape.format in _FLOAT8:
        return _float8(_FLOAT8[shape.format], field, lanes)
    if shape.format == "int8":
        field = let(T.shift_right(field, splat(24, "int32", lanes)))
    if zero is not None and not shape.float_zero_points:
        field = let(field - zero)
    value = let(T.Cast(f"float32x{lanes}", field))
    return let(value - zero) if shape.float_zero_points else value


def _float8(kind: _Float8, top: Expr, lanes: int) -> Expr:
    """Exponent and mantissa put in their places; the product makes up for the other bias, and makes
    subnormals normal."""
    shift = 24 - (_MANTISSA - kind.mantissa)
    kept = ((0x7F << (_MANTISSA - kind.mantissa)) | 1 << 31) - (1 << 32)  # as an int32
    placed = T.bitwise_and(
        T.shift_right(top, splat(shift, "int32", lanes)), splat(kept, "int32", lanes)
    )
    bits = let(placed)
    factor = splat(2.0 ** (_BIAS - kind.bias), "float32", lanes)
    return let(T.reinterpret(f"float32x{lanes}", bits) * factor)


def _zero_point(
    shape: LinearShape, isa: Isa, by_channel: Callable[[str, int], Expr], v: int
) -> Expr | None:
    """What is taken off a vector's weights, None where nothing is."""
    if not shape.has_zero_points:
        return splat(8, "int32", isa.lanes) if shape.format == "int4" else None
    stored = by_channel("zero_points", v)
    return let(stored if shape.float_zero_points else T.Cast(f"int32x{isa.lanes}", stored))


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    return {**tile_space(isa), "ku": (8, 16, 32)}


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    tile = tile_knobs(shape, isa, registers_per_cell=2, max_rows=4)
    return {**tile, "ku": 8, "pf": int(shape.m == 1 and isa.prefetch)}


def operands(
    shape: LinearShape, activations: Sequence[np.ndarray], weights: Weights
) -> tuple[np.ndarray, np.ndarray]:
    x = activations[0].astype(np.float64)
    if shape.format not in _FLOAT8:
        return x, grouped.dequantized(shape, weights)
    values = weights.weight.view(_FLOAT8[shape.format].numpy).astype(np.float64)
    assert weights.scales is not None
    return x, values * weights.scales.astype(np.float64).reshape(-1, 1)
