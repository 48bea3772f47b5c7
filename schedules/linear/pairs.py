"""Linear layers with sparse int4 weights in groups on int8 activations: two of every four of k.

What ``grouped`` computes, to the same bits. Of each PAIRS.size consecutive k, each channel has two
weights, zeros among them where it has fewer, with their places in 2 bits: 6 bits where a dense
kernel reads 16. The weights of PAIR_UNIT consecutive k of a vector's channels lie together, in
steps of _STEP of k: those of two steps as nibbles, those of the next two, the places of all four.
The products of the weights left out are 0, whatever the activations are, so that the integer sums
lack nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import PAIRS, Isa, PairPicking
from slmtvm.schedules.isa.base import Buffer, Expr, Vectors, let, load, prefetch, splat
from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.linear import grouped
from slmtvm.schedules.linear.blocks import LINE_BYTES, PREFETCH_BYTES
from slmtvm.schedules.linear.integer import Sums
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace, row_knobs
from slmtvm.schedules.linear.packing import pad, panels_of_rows, unpacked
from slmtvm.schedules.linear.scheme import Weights
from slmtvm.schedules.linear.shape import MAX_TURNED_GROUP, PAIR_UNIT, LinearShape
from slmtvm.schedules.linear.tile import Registers, Store, Tile

_STEP = 8  # of k, that are multiplied together
STEPS = PAIR_UNIT // _STEP  # of a unit
PARTS = 3  # of a unit's bytes, each one for each weight of a step: two of nibbles, one of places
KEPT = _STEP * PAIRS.kept // PAIRS.size  # weights of a channel in a step
_ZERO = 8  # what a stored weight is less

_BYTE_GROUP = 32
"""Up to so many of k, the sum of a group's weights, half of them at most -8 to 7, fits a byte."""

BYTES_LEFT = 6 / 8
"""Bytes of weights and places, of those of all weights; beside scales, which stay."""

_SAMPLE = 16  # channels

_MOST_ROWS = 8  # of a tile
_FEW_ROWS = 16  # that fill too little of vectors of rows
_AHEAD = 6  # times PREFETCH_BYTES: measured

activations = grouped.activations
operands = grouped.operands


def weight_tensors(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """weight uint8 (panels, groups, units, bytes); scales (panels, groups, isa.panel); where sums
    have an offset, weight_sums int8 or int16 of the same shape: a group's weights summed."""
    isa = isa.for_blocks
    by_group = (isa.panels(shape.n), shape.groups, isa.panel)
    units = shape.group_size // PAIR_UNIT
    tensors = [
        Tensor("weight", (*by_group[:2], units, unit_bytes(isa)), "uint8"),
        Tensor("scales", by_group, shape.scale_dtype),
    ]
    summed = "int8" if shape.group_size <= _BYTE_GROUP else "int16"
    return tensors + [Tensor("weight_sums", by_group, summed)] * (isa.pair_picking().offset != 0)


def part_bytes(isa: Isa) -> int:
    """Of a unit's nibbles of two steps, or of its places."""
    return isa.panel * KEPT


def unit_bytes(isa: Isa) -> int:
    """Of a unit of k of a panel."""
    return PARTS * part_bytes(isa)


def raw_bytes(isa: Isa) -> int:
    """What of a part is a vector's."""
    return isa.lanes * KEPT


def centred(shape: LinearShape, weights: Weights) -> np.ndarray | None:
    """The weights less their zero points, int8 (n, k); None where one is not -8 to 7."""
    values = unpacked(shape, weights.weight).astype(np.int16)
    zeros: np.ndarray | int = shape.default_zero
    if weights.zero_points is not None:
        if weights.zero_points.dtype.kind == "f":
            return None
        by_group = weights.zero_points.reshape(shape.n, shape.groups).astype(np.int16)
        zeros = np.repeat(by_group, shape.group_size, axis=1)[:, : shape.k]
    plain = values - zeros
    if plain.min() < -_ZERO or plain.max() >= _ZERO:
        return None
    return np.asarray(plain.astype(np.int8))


def fits(shape: LinearShape, weights: Weights) -> bool:
    """Whether no channel has more than two weights of four, zero points taken off."""
    if shape.n > _SAMPLE and not fits(*_first_channels(shape, weights)):
        return False  # as most weights show
    plain = centred(shape, weights)
    if plain is None:
        return False
    used = np.pad(plain != 0, ((0, 0), (0, -plain.shape[1] % PAIRS.size)))
    counts = used.reshape(len(used), -1, PAIRS.size).sum(axis=2)
    return bool((counts <= PAIRS.kept).all())


def _first_channels(shape: LinearShape, weights: Weights) -> tuple[LinearShape, Weights]:
    zeros = weights.zero_points
    if zeros is not None:
        zeros = zeros.reshape(shape.n, -1)[:_SAMPLE]
    return replace(shape, n=_SAMPLE), Weights(weights.weight[:_SAMPLE], None, zeros)


def pack(shape: LinearShape, isa: Isa, weights: Weights) -> list[np.ndarray]:
    """As ``grouped`` takes them, of which ``fits`` holds; zero points are taken off."""
    plain = centred(shape, weights)
    assert plain is not None and weights.scales is not None, shape
    isa = isa.for_blocks
    panel, rows = isa.panel, isa.panels(shape.n) * isa.panel
    whole = pad(plain, rows, shape.groups * shape.group_size)
    split = whole.reshape(rows, -1, PAIRS.size)
    order = np.argsort(split == 0, axis=2, kind="stable")[:, :, : PAIRS.kept]
    order.sort(axis=2)  # for ``turned_pairs``
    kept = np.take_along_axis(split, order, axis=2)
    assert int((kept != 0).sum()) == int((whole != 0).sum()), shape
    # (panels, units, steps, channels, kept)
    by_step = (rows // panel, panel, whole.shape[1] // PAIR_UNIT, STEPS, KEPT)
    values, places = (
        a.reshape(by_step).transpose(0, 2, 3, 1, 4)
        for a in ((kept + _ZERO).astype(np.uint8), order.astype(np.uint8))
    )
    nibbles = values[:, :, ::2] | values[:, :, 1::2] << 4
    shifts = np.arange(0, 2 * STEPS, 2, dtype=np.uint8).reshape(-1, 1, 1)
    quarters = np.bitwise_or.reduce(places << shifts, axis=2, keepdims=True)
    tensors = weight_tensors(shape, isa)
    scales = pad(weights.scales.reshape(shape.n, shape.groups), rows, shape.groups)
    arrays = [
        np.concatenate([nibbles, quarters], axis=2).reshape(tensors[0].shape),
        panels_of_rows(scales.astype(shape.scale_dtype), panel),
    ]
    if len(tensors) == len(arrays):
        return arrays
    sums = whole.reshape(rows, shape.groups, -1).sum(axis=2, dtype=np.int32)
    return [*arrays, panels_of_rows(sums.astype(tensors[2].dtype), panel)]


def turns(shape: LinearShape, isa: Isa) -> bool:
    """Whether so many rows gain from being turned, see ``turned_pairs``."""
    fits = shape.m > _FEW_ROWS and shape.group_size <= MAX_TURNED_GROUP
    return fits and isa.turned_pair_time is not None


def relative_time(shape: LinearShape, isa: Isa) -> float:
    """What the kernel is expected to take, of the dense kernel's time."""
    assert isa.pair_times is not None, isa.name
    if turns(shape, isa):
        assert isa.turned_pair_time is not None
        return isa.turned_pair_time
    return isa.pair_times[shape.m > 1]


def layout(shape: LinearShape, isa: Isa) -> str:
    """See ``linear.layout``."""
    sums = "-sums" if isa.for_blocks.pair_picking().offset else ""
    return f"{shape.window}-panel{isa.panel}{sums}-{shape.format}-block-s{shape.scale_dtype[5:]}"


def emit(
    shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    def add(group: Expr, sums: Registers) -> None:
        _add_group(shape, tile, knobs, named, group, sums)

    grouped.sum_groups(shape, knobs, tile, store, add)


def _add_group(
    shape: LinearShape,
    tile: Tile,
    knobs: Knobs,
    named: Mapping[str, Buffer],
    group: Expr,
    sums: Registers,
) -> None:
    isa = tile.isa
    picking = isa.pair_picking()
    units = shape.group_size // PAIR_UNIT
    size = units * unit_bytes(isa)
    # Named, for addresses to be these and constants.
    starts = [
        let(((tile.first_panel + panel) * shape.groups + group) * size)
        for panel in range(-(-tile.vectors // isa.vectors))
    ]
    row_starts = [
        let(tile.row(r) * shape.padded_k + group * shape.group_size) for r in range(tile.rows)
    ]
    if knobs["pf"]:
        for at in starts:
            for line in range(0, size, LINE_BYTES):
                prefetch(named["weight"], at + line + knobs["pf"] * PREFETCH_BYTES)
    states: dict[tuple[int, int], Vectors | None] = dict.fromkeys(tile.cells())
    finished: dict[tuple[int, int], Expr] = {}
    taken = 0

    def finish() -> None:
        for cell, state in states.items():
            if state is not None:
                total = picking.finish(state)
                finished[cell] = let(finished[cell] + total) if cell in finished else total
                states[cell] = None

    for unit in range(units):
        if picking.max_steps is not None and taken + STEPS > picking.max_steps:
            finish()
            taken = 0
        taken += STEPS
        _add_unit(tile, named, picking, unit, starts, row_starts, states)
    finish()
    integers = _without_offset(shape, tile, named, picking, group, finished)
    grouped.add_scaled(shape, tile, named, group, integers, [None] * tile.vectors, sums)


def _add_unit(
    tile: Tile,
    named: Mapping[str, Buffer],
    picking: PairPicking,
    unit: int,
    starts: Sequence[Expr],
    row_starts: Sequence[Expr],
    states: dict[tuple[int, int], Vectors | None],
) -> None:
    """Add a unit of k to the ``states`` of the tile's cells; a group's weights of each panel and
    activations of each row begin at ``starts`` and ``row_starts``."""
    isa = tile.isa
    raw, part = raw_bytes(isa), part_bytes(isa)
    met = []
    for v in range(tile.vectors):
        at = starts[v // isa.vectors] + unit * unit_bytes(isa) + v % isa.vectors * raw
        first, second, stored = (load(named["weight"], at + i * part, raw) for i in range(PARTS))
        places = picking.places(stored)
        weights = [*picking.weights(first), *picking.weights(second)]
        met.append((weights, places))
    for r, start in enumerate(row_starts):
        row = picking.row(named["xq"], start + unit * PAIR_UNIT)
        for v, (weights, places) in enumerate(met):
            state = states[r, v]
            for step in range(STEPS):
                state = picking.step(state, weights[step], places[step], row[step])
            # Or LLVM takes one vector of all rows after the other.
            states[r, v] = isa.in_order(state) if tile.rows > 1 and state else state


def _without_offset(
    shape: LinearShape,
    tile: Tile,
    named: Mapping[str, Buffer],
    picking: PairPicking,
    group: Expr,
    integers: Sums,
) -> Sums:
    """The sums less what the offset of the activations adds to each."""
    if not picking.offset:
        return integers
    isa = tile.isa
    corrected = {}
    for v in range(tile.vectors):
        at = (tile.panel(v) * shape.groups + group) * isa.panel + tile.lane(v)
        wide = let(T.Cast(f"int32x{isa.lanes}", load(named["weight_sums"], at, isa.lanes)))
        more = let(wide * splat(picking.offset, "int32", isa.lanes))
        for row in range(tile.rows):
            corrected[row, v] = let(integers[row, v] - more)
    return corrected


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    whole = isa.for_blocks.vectors
    rows = (1,) if shape.m == 1 else (2, 3, 4, 6, 8)
    return {"mr": rows, "nv": (whole, 2 * whole), "gu": (1, 2), "pf": (0, 2, 4, 6, 8)}


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    """Of many rows, so many that weights taken apart serve: their sums need not fit registers."""
    whole = isa.for_blocks.vectors
    if shape.m == 1:
        return {"mr": 1, "nv": whole, "gu": 2, "pf": _AHEAD * int(isa.prefetch)}
    return {"mr": row_knobs(shape.m, _MOST_ROWS), "nv": 2 * whole, "gu": 1, "pf": 0}
