"""Linear layers with sparse int8 weights on 8-bit activations: lists of dense blocks.

What ``by_row`` computes, to the same bits. A block is what one step of a dot product multiplies,
``Isa.block_channels`` output channels by ``Isa.k_step`` values of k. A column of blocks lists, in
order of k, those that hold any weight that is not zero; the products of the others are 0, whatever
the activations are, so that the integer sums lack nothing. Where there are many rows, some ISAs
load the activations of several together, turned (``turned_rows``), and take them lane by lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.isa.base import Buffer, Dot, Expr, Vectors, let, load, prefetch
from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.linear import by_row, turned_rows
from slmtvm.schedules.linear.integer import Sums
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace, row_knobs
from slmtvm.schedules.linear.rows_in_lanes import MIN_ROWS
from slmtvm.schedules.linear.scheme import Weights
from slmtvm.schedules.linear.shape import LinearShape
from slmtvm.schedules.linear.tile import Registers, Store, Tile

_PLACE_BYTES = 2

LINE_BYTES = 64
PREFETCH_BYTES = 512

_CHAINS = 4
"""States that take turns, at least, where registers are left: a dot product takes so many cycles,
and one can begin in each."""

operands = by_row.operands


def activations(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """Those of ``by_row``; where they are ``turned``, xt as ``turned_rows`` has it for xq."""
    found = by_row.activations(shape, isa)
    return [turned_rows.tensor(shape, isa), *found[1:]] if shape.turned else found


def turns(m: int, isa: Isa) -> bool:
    """Whether so many rows gain from being turned."""
    return isa.list_cost_of_turned is not None and m >= MIN_ROWS


def weight_tensors(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """starts int32 (columns + 1): where in the other two the list of each column begins; places
    uint16: where in k each block lies; blocks int8 (., block_channels, k_step); then what
    ``by_row`` has beside the weight."""
    isa = isa.for_blocks
    columns = isa.panels(shape.n) * isa.panel // isa.block_channels
    most = columns * shape.padded_k // isa.k_step
    return [
        Tensor("starts", (columns + 1,), "int32"),
        Tensor("places", (most,), "uint16", at_most=True),
        Tensor("blocks", (most, isa.block_channels, isa.k_step), "int8", at_most=True),
        *by_row.weight_tensors(shape, isa)[1:],
    ]


def pack(shape: LinearShape, isa: Isa, weights: Weights) -> list[np.ndarray]:
    """As ``by_row`` takes them. Zero points that ``shape`` lacks are taken off the weights, which
    has to be possible in int8 (see ``centred``)."""
    isa = isa.for_blocks
    if weights.zero_points is not None and not shape.has_zero_points:
        plain = centred(weights)
        assert plain is not None, shape
        weights = plain
    whole, *beside, zeros = by_row.padded(shape, isa, weights)
    split = _blocks_of(whole, isa)
    used = (split != zeros.reshape(-1, 1, isa.block_channels, 1)).any(axis=(2, 3))
    starts = np.concatenate([[0], used.sum(axis=1).cumsum()]).astype(np.int32)
    places = (used.nonzero()[1] * isa.k_step).astype(np.uint16)
    if not places.size:  # an array has to hold something; no list has this block
        used[0, 0], places = True, np.zeros(1, np.uint16)
    return [starts, places, split[used], *beside, *[zeros] * shape.has_zero_points]


def centred(weights: Weights) -> Weights | None:
    """The same weights without zero points; None where int8 does not hold the differences."""
    if weights.zero_points is None:
        return weights
    zeros = weights.zero_points.reshape(-1, 1).astype(np.int16)
    plain = weights.weight.astype(np.int16) - zeros
    narrow = plain.astype(np.int8)
    return Weights(narrow, weights.scales) if bool((narrow == plain).all()) else None


def without_zero_points(shape: LinearShape, weights: Weights) -> Weights:
    """``centred`` of weights of which it is known that int8 holds them."""
    plain = centred(weights)
    assert plain is not None, shape
    return plain


def density(shape: LinearShape, isa: Isa, weights: Weights) -> float:
    """Which part of the dense kernel's steps is left, padding included: 0..1."""
    isa = isa.for_blocks
    whole, *_, zeros = by_row.padded(shape, isa, weights)
    split = _blocks_of(whole, isa)
    return float((split != zeros.reshape(-1, 1, isa.block_channels, 1)).any(axis=(2, 3)).mean())


def bytes_of_block(isa: Isa) -> float:
    """Bytes that a listed block takes, of those of its weights."""
    isa = isa.for_blocks
    return 1 + _PLACE_BYTES / (isa.block_channels * isa.k_step)


def relative_time(shape: LinearShape, isa: Isa, density: float) -> float:
    """What the kernel is expected to take, of the dense kernel's time where the weights are in
    cache; where they are read from memory it is less, on the ISAs known here."""
    cost = isa.list_cost if shape.m == 1 else isa.list_cost_of_rows
    if turns(shape.m, isa):
        assert isa.list_cost_of_turned is not None
        cost = isa.list_cost_of_turned
    return density * cost.step + cost.ends * isa.k_step / shape.padded_k


def _blocks_of(whole: np.ndarray, isa: Isa) -> np.ndarray:
    """(channels, k) -> (columns, k / k_step, block_channels, k_step)."""
    channels, k = whole.shape
    size = isa.block_channels
    return whole.reshape(channels // size, size, k // isa.k_step, isa.k_step).transpose(0, 2, 1, 3)


def emit(
    shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    sums: Sums = {}
    together = tile.isa.block_channels // tile.isa.lanes
    for first in range(0, tile.vectors, together):
        count = min(together, tile.vectors - first)
        sums |= _column(shape, knobs, tile, named, first, count)
    by_row.write(tile, named, sums, store)


def _column(
    shape: LinearShape,
    knobs: Knobs,
    tile: Tile,
    named: Mapping[str, Buffer],
    first: int,
    count: int,
) -> Sums:
    """Sums of ``xq (q - z)`` of the ``count`` vectors from ``first``, which share a list."""
    isa, unroll = tile.isa, knobs["ku"]
    dot = isa.s8_row()
    # Where channels have zero points, one sum more for each row: of the activations that met them.
    columns = count + shape.has_zero_points
    cells = [(row, c) for row in range(tile.rows) for c in range(columns)]
    width = len(dot.state)
    # A step waits for the one before it on the same state: few cells have several states each.
    chains = max(1, min(unroll, _CHAINS // len(cells)))
    carried = Registers("int32", isa.lanes, chains * len(cells) * width)
    assert not shape.turned or knobs["mr"] in _turned_tiles(shape, isa), (shape, knobs)
    activations_at = (
        _turned(shape, tile, named, dot) if shape.turned else _rows(shape, tile, named, dot)
    )

    def state(index: int) -> Vectors:
        return tuple(carried[index * width + i] for i in range(width))

    def blocks(begin: Expr, number: int) -> None:
        states: list[Vectors] = [state(index) for index in range(chains * len(cells))]
        for block in range(number):
            at = let(T.Cast("int32", named["places"][begin + block]))
            where = (begin + block) * isa.block_channels * isa.k_step
            if knobs["pf"] and block * isa.block_channels * isa.k_step % LINE_BYTES == 0:
                prefetch(named["blocks"], where + knobs["pf"] * PREFETCH_BYTES)
            weights = [
                dot.weights(load(named["blocks"], where + c * isa.raw_bytes, isa.raw_bytes))[0]
                for c in range(count)
            ] + [dot.ones()] * shape.has_zero_points
            for row, act in enumerate(activations_at(at)):
                for c in range(columns):
                    index = block % chains * len(cells) + row * columns + c
                    states[index] = dot.step(states[index], weights[c], act)
        for index, after in enumerate(states):
            for i, vector in enumerate(dot.settle(after)):
                carried[index * width + i] = vector

    column = T.floordiv(tile.panel(first) * isa.panel + tile.lane(first), isa.block_channels)
    begin = let(named["starts"][let(column)])
    length = let(named["starts"][column + 1] - begin)
    rounds = let(T.floordiv(length, unroll))
    with T.serial(0, rounds) as part:
        blocks(let(begin + part * unroll), unroll)
    if unroll > 1:
        with T.serial(rounds * unroll, length) as rest:
            blocks(let(begin + rest), 1)
    finished = {}
    for index, cell in enumerate(cells):
        finished[cell] = dot.finish(state(index))
        for chain in range(1, chains):
            finished[cell] = let(finished[cell] + dot.finish(state(chain * len(cells) + index)))
    sums = {}
    for c in range(count):
        for row in range(tile.rows):
            total = finished[row, c]
            if shape.has_zero_points:
                zero = by_row.by_channel(tile, named["zero_points"], first + c)
                total = let(total - zero * finished[row, count])
            sums[row, first + c] = total
    return sums


ActivationsAt = Callable[[Expr], Iterator[Expr]]
"""Where in k a block lies -> what its steps multiply, for each row of a tile."""


def _rows(shape: LinearShape, tile: Tile, named: Mapping[str, Buffer], dot: Dot) -> ActivationsAt:
    def found(at: Expr) -> Iterator[Expr]:
        for row in range(tile.rows):
            yield dot.scattered(named["xq"], tile.row(row) * shape.padded_k + at)

    return found


def _turned(shape: LinearShape, tile: Tile, named: Mapping[str, Buffer], dot: Dot) -> ActivationsAt:
    rows, lanes = turned_rows.lane_rows(shape.m, shape.padded_k, tile.isa), tile.isa.lanes
    start = tile.first_row
    if rows < shape.m:  # there are several row blocks, of whole tiles
        of_block = shape.padded_k // turned_rows.WORD * rows
        start = T.floordiv(start, rows) * of_block + T.floormod(start, rows)
    start = let(start)

    def found(at: Expr) -> Iterator[Expr]:
        begin = let(start + at * (rows // turned_rows.WORD))
        for first in range(0, tile.rows, lanes):
            vector = dot.turned_rows(named["xt"], begin + first)
            for row in range(min(lanes, tile.rows - first)):
                yield dot.activation(vector, row * turned_rows.WORD)

    return found


def _turned_tiles(shape: LinearShape, isa: Isa) -> tuple[int, ...]:
    """Rows that a tile of turned ones can have: it lies in one row block, its sums in registers."""
    rows = turned_rows.lane_rows(shape.m, shape.padded_k, isa)
    per_row = isa.block_channels // isa.lanes * len(isa.s8_row().state)
    sizes = range(isa.lanes, isa.registers * 3 // 4 // per_row + 1, isa.lanes)
    return tuple(mr for mr in sizes if rows >= shape.m or rows % mr == 0)


def rows_of_tile(shape: LinearShape, isa: Isa, most: int) -> int:
    """The rows that a tile of turned ones can have, up to ``most`` where there is such a number."""
    tiles = _turned_tiles(shape, isa)
    return max((mr for mr in tiles if mr <= most), default=tiles[0])


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    together = isa.for_blocks.block_channels // isa.for_blocks.lanes
    if shape.turned:
        return {"mr": _turned_tiles(shape, isa), "nv": (together,), "ku": (1, 2, 4), "pf": (0,)}
    vectors = tuple(together * i for i in (1, 2) if together * i * isa.for_blocks.lanes <= 16)
    return {"mr": (1, 2, 3, 4, 6, 8), "nv": vectors or (1,), "ku": (1, 2, 4, 8), "pf": (0, 2, 4, 8)}


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    isa = isa.for_blocks
    together = isa.block_channels // isa.lanes
    if shape.turned:
        rows = turned_rows.lane_rows(shape.m, shape.padded_k, isa)
        # As few tiles as can be, and these of one size.
        mr = min(_turned_tiles(shape, isa), key=lambda mr: (-(-rows // mr), mr))
        return {"mr": mr, "nv": together, "ku": 2, "pf": 0}
    per_row = together * len(isa.s8_row().state)
    rows = row_knobs(shape.m, isa.registers * 5 // 8 // per_row)
    ahead = 8 * int(shape.m == 1 and isa.prefetch)
    return {"mr": rows, "nv": isa.vectors, "ku": isa.list_unroll if rows == 1 else 1, "pf": ahead}
