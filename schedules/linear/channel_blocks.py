"""Linear layers whose weights are scaled by blocks of output channels, anew for each k.

``y = chain over k of fma(x[k], (q[k] - z[k]) * s[k], y)`` from 0, then ``+ bias + residual``; the
scale and the zero point are numbers that all channels of a block share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.isa.base import Buffer, Expr, let
from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace, prefetches, tile_knobs, tile_space
from slmtvm.schedules.linear.packing import pack_quantized, pad, values
from slmtvm.schedules.linear.scheme import Weights
from slmtvm.schedules.linear.shape import LinearShape
from slmtvm.schedules.linear.tile import Registers, Store, Tile
from slmtvm.schedules.linear.widening import default_zero, fields, values_of_a_load, widened


def activations(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """x float32 (m, k)."""
    return [Tensor("x", (shape.m, shape.k), "float32")]


def weight_tensors(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """weight: bytes (panels, padded_k * bits / 8, isa.panel); scales float32 and zero_points bytes
    (blocks, k)."""
    panels = isa.panels(shape.n)
    by_block = (_blocks(shape, isa), shape.k)
    tensors = [
        Tensor("weight", (panels, shape.stored_k, isa.panel), shape.stored_dtype),
        Tensor("scales", by_block, "float32"),
    ]
    return tensors + [Tensor("zero_points", by_block, shape.stored_dtype)] * shape.has_zero_points


def _blocks(shape: LinearShape, isa: Isa) -> int:
    """Blocks of the channels, with those that only fill the last panel."""
    return -(-isa.panels(shape.n) * isa.panel // shape.group_channels)


def pack(shape: LinearShape, isa: Isa, weights: Weights) -> list[np.ndarray]:
    """The weight as ``grouped`` takes it; scales float (ceil(n / group_channels), k) and zero
    points bytes of the same shape."""
    assert weights.scales is not None
    blocks = _blocks(shape, isa)
    padding = np.zeros((isa.panels(shape.n) * isa.panel, shape.padded_k), shape.stored_dtype)
    arrays = [
        pack_quantized(shape, isa, weights.weight, padding),
        pad(weights.scales.astype(np.float32), blocks, shape.k),
    ]
    if weights.zero_points is not None:
        arrays.append(pad(weights.zero_points, blocks, shape.k))
    return arrays


def emit(
    shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    lanes = tile.isa.lanes
    sums = Registers("float32", lanes, tile.rows * tile.vectors)
    # Of a mixture, this counts the channels of all experts.
    channel = tile.panel(0) * tile.isa.panel + tile.lane(0)
    first = let(T.floordiv(channel, shape.group_channels))

    def step(k: Expr, count: int) -> None:
        columns = [
            fields(shape, tile, named["weight"], v, k, count, knobs) for v in range(tile.vectors)
        ]
        for place in range(count):
            shared: dict[tuple[int, ...], tuple[Expr, Expr | None]] = {}
            scaled = []
            for v, column in enumerate(columns):
                blocks = _blocks_of(shape, lanes, v)
                if blocks not in shared:
                    at = [(first + block) * shape.k + k + place for block in blocks]
                    shared[blocks] = _scale_and_zero(shape, lanes, named, at)
                scale, zero = shared[blocks]
                scaled.append(let(widened(shape, lanes, column[place], zero) * scale))
            for row in range(tile.rows):
                a = let(T.Broadcast(named["x"][tile.row(row) * shape.k + k + place], lanes))
                for v, weight in enumerate(scaled):
                    index = row * tile.vectors + v
                    sums[index] = T.fma(a, weight, sums[index])

    unroll = max(knobs["ku"], values_of_a_load(shape, tile.isa))
    parts, left = divmod(shape.k, unroll)
    with T.serial(parts) as part:
        step(part * unroll, unroll)
    if left:
        step(T.int32(parts * unroll), left)
    for row, v in tile.cells():
        store.add_and_write(tile, row, v, sums[row * tile.vectors + v])


def _blocks_of(shape: LinearShape, lanes: int, v: int) -> tuple[int, ...]:
    """The blocks that vector ``v`` of a tile lies in, counted from the tile's first.

    Both sizes, and the tile's width, are powers of two: a tile begins with a block or is inside
    of one.
    """
    begin = v * lanes // shape.group_channels
    return tuple(range(begin, begin + max(1, lanes // shape.group_channels)))


def _scale_and_zero(
    shape: LinearShape, lanes: int, named: Mapping[str, Buffer], at: list[Expr]
) -> tuple[Expr, Expr | None]:
    """A vector's scales and what is taken off its weights, from the places of its blocks."""
    scale = _side_by_side([named["scales"][i] for i in at], lanes)
    if not shape.has_zero_points:
        return scale, default_zero(shape, lanes)
    numbers = [let(T.Cast("int32", named["zero_points"][i])) for i in at]
    if shape.bits <= 8:
        return scale, _side_by_side(numbers, lanes)
    # TVM fails to bound a sum of integers that are not masked and a choice of others: hide them.
    bits = [let(T.reinterpret("float32", number)) for number in numbers]
    return scale, let(T.reinterpret(f"int32x{lanes}", _side_by_side(bits, lanes)))


def _side_by_side(numbers: list[Expr], lanes: int) -> Expr:
    """A vector of equal parts, in each of which every lane is the same number."""
    vector = T.Broadcast(numbers[-1], lanes)
    each = lanes // len(numbers)
    lane = T.Ramp(T.int32(0), T.int32(1), lanes) if len(numbers) > 1 else None
    for part in range(len(numbers) - 2, -1, -1):
        before = lane < T.Broadcast(T.int32((part + 1) * each), lanes)
        vector = T.Select(before, T.Broadcast(numbers[part], lanes), vector)
    return let(vector)


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    return {**tile_space(shape, isa), "ku": (8, 16, 32)}


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    tile = tile_knobs(shape, isa, registers_per_cell=1, max_rows=4)
    return {**tile, "ku": 8, "pf": int(prefetches(shape, isa))}


def operands(
    shape: LinearShape, activations: Sequence[np.ndarray], weights: Weights
) -> tuple[np.ndarray, np.ndarray]:
    assert weights.scales is not None

    def spread(per: np.ndarray) -> np.ndarray:
        return np.repeat(per.astype(np.float64), shape.group_channels, axis=0)[: shape.n]

    zeros = weights.zero_points
    offset = np.float64(shape.default_zero) if zeros is None else spread(zeros)
    w = (values(shape, weights.weight) - offset) * spread(weights.scales)
    return activations[0].astype(np.float64), w
