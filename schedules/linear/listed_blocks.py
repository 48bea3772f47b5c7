"""Linear layers with zeros in int8 weights, for many rows: a vector holds rows of 8-bit numbers.

What ``by_row`` computes, to the same bits. A block is ``Isa.k_step`` consecutive k of one output
channel; a channel lists those that hold any weight that is not zero. The activations come turned,
the bytes of all rows that meet a block together, so that what a step loads is the block, broadcast,
and whole vectors of rows wherever it is. Products left out are 0, and integers sum exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.isa.base import Buffer, Expr, Vectors, let, splat
from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.linear import by_row, turned_rows
from slmtvm.schedules.linear.blocks import without_zero_points
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace
from slmtvm.schedules.linear.rows_in_lanes import by_rows
from slmtvm.schedules.linear.scheme import Weights
from slmtvm.schedules.linear.shape import IN_LISTS, LinearShape
from slmtvm.schedules.linear.tile import Registers, Store, Tile
from slmtvm.schedules.linear.turned_rows import WORD

_PLACE_BYTES = 2
_NEAR_K = 1024  # of which row blocks hold many rows in caches that are near
_FAR = 1.45  # times as long a step takes with more of them: measured on AVX2

operands = by_row.operands


def activations(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """xt as ``turned_rows`` has it; xs and xz as ``by_row`` has them."""
    return [turned_rows.tensor(shape, isa), *by_row.activations(shape, isa)[1:]]


def weight_tensors(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """starts int32 (channels + 1): where in the other two the list of each channel begins; places
    uint16: which of a row's blocks each is; blocks int8 (., k_step); missing int32 (panels,
    isa.panel), what sums lack, where they lack anything; then what ``by_row`` has beside the
    weight."""
    channels = isa.panels(shape.n) * isa.panel
    most = channels * shape.padded_k // WORD
    tensors = [
        Tensor("starts", (channels + 1,), "int32"),
        Tensor("places", (most,), "uint16", at_most=True),
        Tensor("blocks", (most, WORD), "int8", at_most=True),
    ]
    if _lacks(isa):
        tensors.append(Tensor("missing", (isa.panels(shape.n), isa.panel), "int32"))
    return [*tensors, *by_row.weight_tensors(shape, isa)[1:]]


def pack(shape: LinearShape, isa: Isa, weights: Weights) -> list[np.ndarray]:
    """As ``by_row`` takes them; zero points are taken off the weights, see ``blocks.centred``."""
    whole, *beside, _ = by_row.padded(shape, isa, without_zero_points(shape, weights))
    split = whole.reshape(len(whole), -1, WORD)
    used = (split != 0).any(axis=2)
    starts = np.concatenate([[0], used.sum(axis=1).cumsum()]).astype(np.int32)
    if not starts[-1]:  # an array has to hold something; no list has this block
        used[0, 0] = True
    missing = isa.rows_dot().missing(whole)
    lacking = [] if missing is None else [missing.reshape(-1, isa.panel)]
    return [starts, used.nonzero()[1].astype(np.uint16), split[used], *lacking, *beside]


def density(shape: LinearShape, weights: Weights) -> float:
    """Which part of the blocks holds a weight that is not zero, padding of k included: 0..1."""
    used = without_zero_points(shape, weights).weight != 0
    used = np.pad(used, ((0, 0), (0, shape.padded_k - shape.k)))
    return float(used.reshape(len(used), -1, WORD).any(axis=2).mean())


def relative_time(shape: LinearShape, isa: Isa, density: float) -> float:
    """What the kernel is expected to take, of the dense kernel's time."""
    assert isa.listed_blocks is not None, isa.name
    step = isa.listed_blocks.step * (1 if shape.padded_k <= _NEAR_K else _FAR)
    return density * step + isa.listed_blocks.ends * WORD / shape.padded_k


def bytes_left(density: float) -> float:
    """Bytes of the lists, of those of all weights."""
    return density * (1 + _PLACE_BYTES / WORD)


def layout(shape: LinearShape, isa: Isa) -> str:
    """See ``linear.layout``."""
    lacks = "-missing" if _lacks(isa) else ""
    return f"{IN_LISTS}{WORD}-panel{isa.panel}{lacks}-{shape.format}-row_u8"


def _lacks(isa: Isa) -> bool:
    return isa.rows_dot().missing(np.zeros((1, 1), np.int8)) is not None


def emit(
    shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    isa, lanes = tile.isa, tile.isa.lanes
    rows, vectors = turned_rows.lane_rows(shape.m, shape.padded_k, isa), -(-tile.rows // lanes)
    dot = isa.rows_dot()
    width = len(dot.state)
    start = let(tile.first_row * (shape.padded_k // WORD))  # of the row block in xt
    # A channel's sums are a row of these: squares of them are turned to have channels in lanes.
    staged = T.alloc_buffer((lanes * vectors * lanes,), "int32", scope="local")

    def stage(vector: int, channel: Expr, sums: Expr) -> None:
        T.buffer_store(staged, sums, [T.ramp((vector * lanes + channel) * lanes, 1, lanes)])

    with T.serial(tile.channels) as channel:
        at = let(tile.channel(0) + channel)
        carried = Registers("int32", lanes, vectors * width)

        def state(vector: int, carried: Registers = carried) -> Vectors:
            return tuple(carried[vector * width + i] for i in range(width))

        begin, end = let(named["starts"][at]), let(named["starts"][at + 1])
        with T.serial(begin, end) as index:
            block = dot.weight(named["blocks"], index * WORD)
            row = let(start + T.Cast("int32", named["places"][index]) * rows)
            for v in range(vectors):
                after = dot.step(state(v), block, dot.rows(named["xt"], row + v * lanes))
                for i, vector in enumerate(after):
                    carried[v * width + i] = vector
        for v in range(vectors):
            stage(v, channel, dot.finish(state(v)))
    for channel in range(tile.channels, lanes):
        for v in range(vectors):
            stage(v, channel, splat(0, "int32", lanes))
    write_rows(tile, named, staged, store)


def write_rows(tile: Tile, named: Mapping[str, Buffer], staged: Buffer, store: Store) -> None:
    """Scale and write sums that ``staged`` has as ``rows_in_lanes.by_rows`` takes them."""

    def write(first: Expr, found: list[Expr]) -> None:
        part = dataclasses.replace(tile, rows=len(found), first_row=let(tile.first_row + first))
        if "missing" in named:
            missing = by_row.by_channel(tile, named["missing"], 0)
            found = [let(sums + missing) for sums in found]
        by_row.write(part, named, {(i, 0): sums for i, sums in enumerate(found)}, store)

    by_rows(staged, tile.rows, tile.isa.lanes, write)


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    return {name: (value,) for name, value in default_knobs(shape, isa).items()}


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    return {"mr": turned_rows.lane_rows(shape.m, shape.padded_k, isa), "nv": 1}
