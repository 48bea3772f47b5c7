"""Linear layers with integer or float8 weights on float32 activations, widened in registers.

``y = sum over groups g of fma(chain of fma(x[k], q[k] - z[g]) over the group, s[g], y)``, then
``+ bias + residual``. A layer without groups is one group. Weights are packed as the integer
kernels' are, so that a bundle's kernels of both kinds can share them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.isa.base import Buffer, Expr, let, load
from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.linear import grouped
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace, prefetches, tile_knobs, tile_space
from slmtvm.schedules.linear.scheme import Weights
from slmtvm.schedules.linear.shape import LinearShape
from slmtvm.schedules.linear.tile import Registers, Store, Tile
from slmtvm.schedules.linear.widening import default_zero, fields, values_of_a_load, widened


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
    # How much further than in x a group lies in the packed weights.
    ahead = group * (shape.stored_group - shape.group_size)

    def by_channel(name: str, v: int) -> Expr:
        at = (tile.panel(v) * shape.groups + group) * isa.panel + tile.lane(v)
        return load(named[name], at, lanes)

    zeros = [_zero_point(shape, isa, by_channel, v) for v in range(tile.vectors)]
    chains = Registers("float32", lanes, tile.rows * tile.vectors)

    def steps(k: Expr, number: int) -> None:
        at = k if shape.stored_group == shape.group_size else k + ahead
        columns = [
            fields(shape, tile, named["weight"], v, at, number, knobs) for v in range(tile.vectors)
        ]
        for place in range(number):
            floats = [
                widened(shape, lanes, c[place], z) for c, z in zip(columns, zeros, strict=True)
            ]
            for row in range(tile.rows):
                a = let(T.Broadcast(named["x"][tile.row(row) * shape.k + k + place], lanes))
                for v, column in enumerate(floats):
                    index = row * tile.vectors + v
                    chains[index] = T.fma(a, column, chains[index])

    unroll = max(knobs["ku"], values_of_a_load(shape, isa))
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


def _zero_point(
    shape: LinearShape, isa: Isa, by_channel: Callable[[str, int], Expr], v: int
) -> Expr | None:
    """What is taken off a vector's weights, None where nothing is."""
    if not shape.has_zero_points:
        return default_zero(shape, isa.lanes)
    stored = by_channel("zero_points", v)
    return let(stored if shape.float_zero_points else T.Cast(f"int32x{isa.lanes}", stored))


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    return {**tile_space(shape, isa), "ku": (8, 16, 32)}


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    tile = tile_knobs(shape, isa, registers_per_cell=2, max_rows=4)
    return {**tile, "ku": 8, "pf": int(prefetches(shape, isa))}


def operands(
    shape: LinearShape, activations: Sequence[np.ndarray], weights: Weights
) -> tuple[np.ndarray, np.ndarray]:
    return activations[0].astype(np.float64), grouped.dequantized(shape, weights)
