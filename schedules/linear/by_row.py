"""Linear layers with int8 weights scaled by channel and 8-bit activations scaled by row.

``y = fma(xs s[j], float(sum_k (xq - xz) (q - z[j])), bias) + residual``; the sum is an exact int32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.isa.base import Buffer, Expr, let, load, splat
from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.linear.integer import Operands, Sums, integer_sums
from slmtvm.schedules.linear.knobs import (
    Knobs,
    KnobSpace,
    ahead,
    prefetches,
    tile_knobs,
    tile_space,
)
from slmtvm.schedules.linear.packing import panels_of_fields
from slmtvm.schedules.linear.scheme import Weights
from slmtvm.schedules.linear.shape import LinearShape
from slmtvm.schedules.linear.tile import Store, Tile


def activations(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """xq (m, padded_k) of ``isa.row_dtype``, xs float32 (m,), xz int32 (m,) 0..255."""
    return [
        Tensor("xq", (shape.m, shape.padded_k), isa.row_dtype),
        Tensor("xs", (shape.m,), "float32"),
        Tensor("xz", (shape.m,), "int32"),
    ]


def weight_tensors(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """weight int8 (panels, padded_k, isa.panel), scales float32, column_sums int32 (sum of q - z
    along k) and zero_points int32, each (panels, isa.panel)."""
    by_channel = (isa.panels(shape.n), isa.panel)
    tensors = [
        Tensor("weight", (by_channel[0], shape.padded_k, isa.panel), "int8"),
        Tensor("scales", by_channel, "float32"),
        Tensor("column_sums", by_channel, "int32"),
    ]
    return tensors + [Tensor("zero_points", by_channel, "int32")] * shape.has_zero_points


def pack(shape: LinearShape, isa: Isa, weights: Weights) -> list[np.ndarray]:
    """weight int8 (n, k); scales float (1,) or (n,); zero_points int8 of the same shape or (1,).

    Padding holds the zero point, so that the padding of activations may hold anything.
    """
    whole, scales, column_sums, zeros = padded(shape, isa, weights)
    arrays = [
        panels_of_fields(whole, isa.panel, isa.k_step, 8).reshape(
            weight_tensors(shape, isa)[0].shape
        ),
        scales,
        column_sums,
    ]
    return arrays + [zeros] * shape.has_zero_points


def padded(shape: LinearShape, isa: Isa, weights: Weights) -> list[np.ndarray]:
    """The weight as ``pack`` takes it, (panels * isa.panel, padded_k); what ``weight_tensors`` has
    beside it."""
    assert weights.scales is not None
    rows = isa.panels(shape.n) * isa.panel
    zeros = np.zeros((rows, 1), np.int8)
    if weights.zero_points is not None:
        zeros[: shape.n, 0] = weights.zero_points.reshape(-1)
    whole = np.repeat(zeros, shape.padded_k, axis=1)
    whole[: shape.n, : shape.k] = weights.weight
    scales = np.zeros(rows, np.float32)
    scales[: shape.n] = weights.scales.reshape(-1)
    column_sums = (whole.astype(np.int32) - zeros.astype(np.int32)).sum(axis=1, dtype=np.int32)
    by_channel = (scales, column_sums, zeros.astype(np.int32))
    return [whole, *(a.reshape(-1, isa.panel) for a in by_channel)]


def emit(
    shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    isa = tile.isa
    products = Operands(
        isa.s8_row(),
        shape.bits,
        named["weight"],
        isa.panel,
        lambda v: tile.panel(v) * shape.padded_k * isa.panel + tile.lane(v) * isa.k_step,
        named["xq"],
        lambda row: tile.row(row) * shape.padded_k,
        sum_rows=shape.has_zero_points,
        ahead=ahead(knobs, knobs["nv"] * isa.lanes * shape.padded_k, 1),
    )
    sums = integer_sums(tile, products, shape.padded_k, knobs["ku"])
    if shape.has_zero_points:
        for v in range(tile.vectors):
            zero = by_channel(tile, named["zero_points"], v)
            for row in range(tile.rows):
                sums[row, v] = let(sums[row, v] - zero * sums[row, tile.vectors])
    write(tile, named, sums, store)


def by_channel(tile: Tile, buffer: Buffer, v: int) -> Expr:
    """What ``buffer`` holds for each channel of a vector."""
    return let(load(buffer, tile.panel(v) * tile.isa.panel + tile.lane(v), tile.isa.lanes))


def write(tile: Tile, named: Mapping[str, Buffer], sums: Sums, store: Store) -> None:
    """Take the rows' zero points off ``sums``, of ``xq (q - z)``, scale them and write them.

    ``sum (xq - xz)(q - z) = sum xq (q - z) - xz sum (q - z)``, the last sum known beforehand.
    """
    isa = tile.isa
    stored_as = 128 if isa.row_dtype == "int8" else 0
    for v in range(tile.vectors):
        scale = by_channel(tile, named["scales"], v)
        column_sum = by_channel(tile, named["column_sums"], v)
        for row in range(tile.rows):
            at = tile.row(row)
            row_zero = T.Broadcast(named["xz"][at] - stored_as, isa.lanes)
            exact = let(sums[row, v] - row_zero * column_sum)
            factor = let(scale * T.Broadcast(named["xs"][at], isa.lanes))
            addends = store.addends(tile, row, v) or [splat(0.0, "float32", isa.lanes)]
            value = let(T.fma(factor, T.Cast(f"float32x{isa.lanes}", exact), addends[0]))
            for addend in addends[1:]:
                value = let(value + addend)
            store.write(tile, row, v, value)


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    return {**tile_space(shape, isa), "ku": (16, 32, 64, 128)}


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    tile = tile_knobs(shape, isa, len(isa.s8_row().state), isa.most_rows)
    return {**tile, "ku": 16, "pf": int(prefetches(shape, isa))}


def operands(
    shape: LinearShape, activations: Sequence[np.ndarray], weights: Weights
) -> tuple[np.ndarray, np.ndarray]:
    """xq are uint8 values, or int8 ones less 128."""
    xq, xs, xz = (a.astype(np.float64) for a in activations)
    q = xq[:, : shape.k] + (128 if activations[0].dtype == np.int8 else 0)
    assert weights.scales is not None
    zeros = np.zeros(1) if weights.zero_points is None else weights.zero_points
    centred = weights.weight.astype(np.float64) - zeros.astype(np.float64).reshape(-1, 1)
    scales = weights.scales.astype(np.float64).reshape(-1, 1)
    return (q - xz[:, None]) * xs[:, None], centred * scales
