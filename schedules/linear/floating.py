"""Linear layers on float32 activations: float32, float16 or bfloat16 weights, float32 sums.

``y[i, j]`` is one chain of fused multiply-adds over k from 0, then ``+ bias + residual``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.isa.base import Buffer, Expr, let, load, prefetch, splat
from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.linear.knobs import (
    Knobs,
    KnobSpace,
    ahead,
    prefetches,
    tile_knobs,
    tile_space,
)
from slmtvm.schedules.linear.packing import pad, panels_of_rows
from slmtvm.schedules.linear.scheme import Weights
from slmtvm.schedules.linear.shape import LinearShape
from slmtvm.schedules.linear.tile import Registers, Store, Tile


def activations(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """x (m, k)."""
    return [Tensor("x", (shape.m, shape.k), "float32")]


def weight_tensors(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """weight: (panels, k, isa.panel); bfloat16 as its bits."""
    dtype = {"f32": "float32", "f16": "float16", "bf16": "uint16"}[shape.format]
    return [Tensor("weight", (isa.panels(shape.n), shape.k, isa.panel), dtype)]


def pack(shape: LinearShape, isa: Isa, weights: Weights) -> list[np.ndarray]:
    """weight float (n, k); bfloat16 as such or as its bits."""
    weight = weights.weight
    dtype = np.dtype(weight_tensors(shape, isa)[0].dtype)
    stored = weight.view(dtype) if shape.format == "bf16" else weight.astype(dtype)
    padded = pad(stored, isa.panels(shape.n) * isa.panel, shape.k)
    return [panels_of_rows(padded, isa.panel)]


def emit(
    shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    isa, x, weight = tile.isa, named["x"], named["weight"]
    distance = ahead(knobs, knobs["nv"] * isa.lanes * shape.k, 4 if shape.format == "f32" else 2)
    sums = Registers("float32", isa.lanes, tile.rows * tile.vectors)

    def step(k: Expr) -> None:
        for v in range(0, tile.vectors, isa.vectors):
            if distance:
                prefetch(weight, _at(shape, tile, v, k) + distance)
        columns = [
            _as_f32(isa, shape, load(weight, _at(shape, tile, v, k), isa.lanes))
            for v in range(tile.vectors)
        ]
        for row in range(tile.rows):
            a = let(T.Broadcast(x[tile.row(row) * shape.k + k], isa.lanes))
            for v, column in enumerate(columns):
                index = row * tile.vectors + v
                sums[index] = T.fma(a, column, sums[index])

    unroll = min(knobs["ku"], shape.k)
    whole = shape.k // unroll * unroll
    with T.serial(shape.k // unroll) as part:
        for k in range(unroll):
            step(part * unroll + k)
    for k in range(whole, shape.k):
        step(k)
    for row, v in tile.cells():
        total = sums[row * tile.vectors + v]
        store.add_and_write(tile, row, v, unsigned_zero(total) if shape.format == "f32" else total)


def unsigned_zero(total: Expr) -> Expr:
    """A sum, -0 as 0: a product that underflows leaves -0, of which later zeros may make 0, and
    kernels that skip these do not know."""
    lanes = int(str(total.ty.dtype).removeprefix("float32x"))
    return let(total + splat(0.0, "float32", lanes))


def _at(shape: LinearShape, tile: Tile, vector: int, k: Expr) -> Expr:
    return (tile.panel(vector) * shape.k + k) * tile.isa.panel + tile.lane(vector)


def _as_f32(isa: Isa, shape: LinearShape, vector: Expr) -> Expr:
    if shape.format == "bf16":  # the upper half of a float32
        wide = let(T.Cast(f"int32x{isa.lanes}", vector))
        bits = let(T.shift_left(wide, splat(16, "int32", isa.lanes)))
        return let(T.reinterpret(f"float32x{isa.lanes}", bits))
    return let(isa.f16_to_f32(vector) if shape.format == "f16" else vector)


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    return {**tile_space(shape, isa), "ku": (1, 2, 4, 8)}


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    tile = tile_knobs(shape, isa, registers_per_cell=1, max_rows=4)
    return {**tile, "ku": 4, "pf": int(prefetches(shape, isa))}


def operands(
    shape: LinearShape, activations: Sequence[np.ndarray], weights: Weights
) -> tuple[np.ndarray, np.ndarray]:
    weight = weights.weight
    values = weight.view(ml_dtypes.bfloat16) if shape.format == "bf16" else weight
    return activations[0].astype(np.float64), values.astype(np.float64)
