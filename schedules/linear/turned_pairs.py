"""Linear layers with sparse int4 weights in groups, for many rows: vectors of rows, in pairs of k.

What ``pairs`` computes of the same packed weights, to the same bits. Two weights of four
consecutive k meet one of the six pairs of these k's activations. Rows come with all six made, those
of a vector of rows together, so that what a step loads is the pair that the places say, and nothing
is picked. A step's rows are made so once for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import PAIR_CHOICES, PAIRS, Isa
from slmtvm.schedules.isa.base import Buffer, Expr, let, load, splat
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.linear import grouped, pairs
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace
from slmtvm.schedules.linear.rows_in_lanes import transposed
from slmtvm.schedules.linear.shape import PAIR_UNIT, LinearShape
from slmtvm.schedules.linear.tile import Store, Tile

_MOST_VECTORS = 4  # of a row block: so many sums in two halves, and what a step takes beside them
_MOST_PANELS = 4  # of a tile
_NEAR_BYTES = 12 * 1024  # of a row block's activations, which all channels of a tile meet in turn

operands = pairs.operands
weight_tensors = pairs.weight_tensors
pack = pairs.pack


def lane_rows(m: int, isa: Isa) -> int:
    """Rows of a row block, whole vectors."""
    lanes = isa.turned_pairs().rows
    return lanes * min(_MOST_VECTORS, -(-m // lanes))


def activations(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """xp (row blocks, windows of four k, PAIR_CHOICES, lane_rows), two activations each as
    ``Isa.turned_pairs`` has them; xr float32 (row blocks, groups, lane_rows), the rows' scales."""
    rows = lane_rows(shape.m, isa)
    blocks = -(-shape.m // rows)
    windows = shape.padded_k // PAIRS.size
    return [
        Tensor("xp", (blocks, windows, len(PAIR_CHOICES), rows), "int16"),
        Tensor("xr", (blocks, shape.groups, rows), "float32"),
    ]


def turning(shape: LinearShape, isa: Isa) -> Kernel:
    """xq and xs as ``grouped`` has them -> what ``activations`` says; 0 scales rows beyond m."""
    m, k, lanes, groups = shape.m, shape.padded_k, isa.lanes, shape.groups
    rows, turned = lane_rows(m, isa), isa.turned_pairs()
    squares = turned.rows // lanes  # of a vector of pairs
    words = shape.group_size // PAIRS.size

    def body(block: Expr, xq: Buffer, xs: Buffer, xp: Buffer, xr: Buffer) -> None:
        row_block, group = let(T.floordiv(block, groups)), let(T.floormod(block, groups))
        first = let(row_block * rows)
        with T.serial(rows // turned.rows) as vector:
            row = let(first + vector * turned.rows)
            for begin in range(0, words, lanes):
                at = let(group * words + begin)
                halves = [_words(xq, row + half * lanes, at) for half in range(squares)]
                for i, both in enumerate(zip(*halves, strict=True)):
                    to = let((first * (k // PAIRS.size) + (at + i) * rows) * len(PAIR_CHOICES))
                    for choice, made in enumerate(turned.choices(both)):
                        place = to + choice * rows + vector * turned.rows
                        T.buffer_store(xp, made, [T.ramp(place, 1, turned.rows)])
        with T.serial(rows) as lane:
            to = let(first * groups + group * rows + lane)
            with T.If(first + lane < m):
                with T.Then():
                    T.buffer_store(xr, xs[(first + lane) * groups + group], [to])
                with T.Else():
                    T.buffer_store(xr, T.float32(0), [to])

    def _words(xq: Buffer, first_row: Expr, at: Expr) -> list[Expr]:
        """``lanes`` words of ``lanes`` rows from word ``at`` on, a vector of rows for each."""
        staged = T.alloc_buffer((lanes * lanes,), "int32", scope="local")
        for i in range(lanes):
            # What a row beyond m is made of does not matter, as long as there is one.
            row = let(T.min(first_row + i, m - 1) if m % rows else first_row + i)
            raw = load(xq, row * k + at * PAIRS.size, lanes * PAIRS.size)
            T.buffer_store(
                staged, T.reinterpret(f"int32x{lanes}", raw), [T.ramp(i * lanes, 1, lanes)]
            )
        return transposed([let(load(staged, i * lanes, lanes)) for i in range(lanes)], lanes)

    tensors = [*grouped.activations(shape, isa)[:2], *activations(shape, isa)]
    name = f"turn_pairs_{isa.name}_m{m}_k{shape.k}_g{shape.group_size}"
    return define(name, tensors, body, grid=-(-m // rows) * groups, outputs=["xp", "xr"])


def scratch(shape: LinearShape, isa: Isa, knobs: Knobs) -> Tensor:
    """What a tile computes in: vectors on the stack would lie across cache lines."""
    return Tensor("scratch", (_Places(shape, isa, knobs["nv"] * isa.lanes).end,), "uint8")


class _Places:
    """Where in the scratch lie a tile's sums, those of a channel's rows together, and what is
    unpacked of ``groups`` groups at a time: pairs of weights and which of PAIR_CHOICES they take,
    two bytes each, [step][channel][window], and [group][channel] what sums begin with, two bytes,
    and scales, float32."""

    def __init__(self, shape: LinearShape, isa: Isa, channels: int) -> None:
        of_group = 2 * len(PAIR_CHOICES) * lane_rows(shape.m, isa) * shape.group_size // PAIRS.size
        self.groups = min(shape.groups, max(1, _NEAR_BYTES // of_group))
        windows = self.groups * shape.group_size // PAIRS.size
        self.sums = 0
        self.weights = 4 * channels * lane_rows(shape.m, isa)
        self.choices = self.weights + 2 * windows * channels
        self.starts = self.choices + 2 * windows * channels
        self.scales = self.starts + 4 * self.groups * channels  # twice as much: aligned
        self.end = self.scales + 4 * self.groups * channels


def emit(
    shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    sums = _Sums(shape, knobs, tile, named)
    sums.clear()
    whole, last = divmod(shape.groups, sums.at.groups)
    if whole:
        with T.serial(whole) as part:
            sums.add(let(part * sums.at.groups), sums.at.groups)
    if last:
        sums.add(T.int32(whole * sums.at.groups), last)
    sums.write(store)


class _Sums:
    """A tile's sums, to which parts of k are added; weights are unpacked for all of its rows."""

    def __init__(
        self, shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer]
    ) -> None:
        self.shape, self.tile, self.isa, self.named = shape, tile, tile.isa, named
        self.at = _Places(shape, tile.isa, knobs["nv"] * tile.isa.lanes)
        self.turned, self.picking = tile.isa.turned_pairs(), tile.isa.pair_picking()
        self.rows = lane_rows(shape.m, tile.isa)  # of a row block
        self.units = shape.group_size // PAIR_UNIT  # of a group
        self.channels = tile.vectors * tile.isa.lanes
        self.vectors = -(-tile.rows // self.turned.rows)  # of rows
        self.halves = self.turned.rows // tile.isa.lanes  # float vectors of one of them

    def _load(self, at: Expr, dtype: str, lanes: int) -> Expr:
        raw = load(self.named["scratch"], at, np.dtype(dtype).itemsize * lanes)
        return let(T.reinterpret(dtype if lanes == 1 else f"{dtype}x{lanes}", raw))

    def _store(self, at: Expr, vector: Expr, size: int) -> None:
        value = T.reinterpret(f"uint8x{size}", vector)
        T.buffer_store(self.named["scratch"], value, [T.ramp(at, 1, size)])

    def clear(self) -> None:
        lanes = self.isa.lanes
        with T.serial(self.channels * self.vectors * self.halves) as i:
            (zeros,) = self.isa.in_order((splat(0.0, "float32", lanes),))  # or LLVM calls memset
            self._store(self.at.sums + i * (4 * lanes), zeros, 4 * lanes)

    def add(self, first: Expr, count: int) -> None:
        """Add groups ``first`` to ``first + count``."""
        self._unpack(first, count)
        lanes = self.isa.lanes
        number = self.vectors * self.halves  # of float vectors
        with T.serial(self.tile.channels) as channel:
            # Squares of a vector's channels and rows, which ``write`` turns.
            vector, lane = T.floordiv(channel, lanes), T.floormod(channel, lanes)
            begin = let((vector * number * lanes + lane) * (4 * lanes) + self.at.sums)
            places = [begin + i * (4 * lanes * lanes) for i in range(number)]
            totals = [self._load(place, "float32", lanes) for place in places]
            for group in range(count):
                totals = self._with_group(totals, let(first + group), group, channel)
            for place, total in zip(places, totals, strict=True):
                self._store(place, total, 4 * lanes)

    def _with_group(self, totals: list[Expr], group: Expr, index: int, channel: Expr) -> list[Expr]:
        """A channel's sums with a group's, which is number ``index`` of those unpacked."""
        lanes, windows = self.isa.lanes, self.shape.group_size // PAIRS.size
        of_block = self.tile.first_row * self.shape.padded_k // PAIRS.size
        at = let((of_block + group * (windows * self.rows)) * len(PAIR_CHOICES))
        states = self._products(at, index, channel)
        place = self.at.scales + (index * self.channels + channel) * 4
        scale = let(T.Broadcast(self._load(place, "float32", 1), lanes))
        row_at = let(self.tile.first_row * self.shape.groups + group * self.rows)
        added: list[Expr] = []
        for exact in (half for state in states for half in self.turned.finish(state)):
            row_scales = load(self.named["xr"], row_at + len(added) * lanes, lanes)
            added.append(let(T.fma(exact, let(scale * row_scales), totals[len(added)])))
        return added

    def _products(self, at: Expr, index: int, channel: Expr) -> list[Expr]:
        """A channel's sums of a group, for each vector of rows; their pairs begin at ``at``."""
        width = self.turned.rows
        place = self.at.starts + (index * self.channels + channel) * 2
        states = [let(T.Broadcast(self._load(place, "int16", 1), width))] * self.vectors
        each = PAIR_UNIT // PAIRS.size // pairs.STEPS  # windows of a step
        for step in range(self.units * pairs.STEPS):
            for window in range(each):
                number = (index * self.units * pairs.STEPS + step) * self.channels * each + window
                place = let(channel * (2 * each)) + 2 * number
                weight = self._load(self.at.weights + place, "int16", 1)
                weight = let(T.Broadcast(weight, width))
                choice = self._load(self.at.choices + place, "uint16", 1)
                row = let(at + T.Cast("int32", choice))
                row = row + (step * each + window) * len(PAIR_CHOICES) * self.rows
                for v in range(self.vectors):
                    met = load(self.named["xp"], row + v * width, width)
                    state = self.turned.step(states[v], weight, met)
                    (states[v],) = self.isa.in_order((state,))  # or LLVM sums by trees
        return states

    def _unpack(self, first: Expr, count: int) -> None:
        isa, tile, weight = self.isa, self.tile, self.named["weight"]
        raw, part = pairs.raw_bytes(isa), pairs.part_bytes(isa)
        factor = splat(self.rows, "uint16", self.turned.rows)
        with T.serial(count * self.units) as unit:
            for v in range(tile.vectors):
                at = (tile.panel(v) * self.shape.groups + first) * self.units + unit
                at = let(at * pairs.unit_bytes(isa) + v % isa.vectors * raw)
                stored = [load(weight, at + i * part, raw) for i in range(pairs.PARTS)]
                nibbles = [w for field in stored[:-1] for w in self.picking.weights(field)]
                choices = self.turned.places(stored[-1])
                for step in range(pairs.STEPS):
                    to = (unit * pairs.STEPS + step) * (self.channels * pairs.KEPT) + v * raw
                    self._store(self.at.weights + to, nibbles[step], raw)
                    self._store(self.at.choices + to, choices[step] * factor, raw)
        with T.serial(count) as group:
            for v in range(tile.vectors):
                self._unpack_group(let(first + group), group, v)

    def _unpack_group(self, group: Expr, index: Expr, v: int) -> None:
        """What belongs to a group of a vector of channels."""
        isa, shape, lanes = self.isa, self.shape, self.isa.lanes
        at = (self.tile.panel(v) * shape.groups + group) * isa.panel + self.tile.lane(v)
        to = index * self.channels + v * lanes
        summed = T.Cast(f"int16x{lanes}", load(self.named["weight_sums"], at, lanes))
        self._store(self.at.starts + to * 2, self.turned.start(summed), 2 * lanes)
        if shape.scale_dtype == "float32":
            scales = load(self.named["scales"], at, lanes)
        else:
            (scales,) = isa.load_halves(self.named["scales"], at, 1)
        self._store(self.at.scales + to * 4, scales, 4 * lanes)

    def write(self, store: Store) -> None:
        """The sums to y: of some rows all channels at once, which lie together."""
        tile, lanes = self.tile, self.isa.lanes

        def rows_of(first: Expr, count: int) -> None:
            for v in range(tile.vectors):
                at = let((first + v * self.vectors * self.turned.rows) * (4 * lanes) + self.at.sums)
                square = [self._load(at + i * (4 * lanes), "float32", lanes) for i in range(lanes)]
                for i, vector in enumerate(transposed(square, lanes)[:count]):
                    store.add_and_write(tile, first + i, v, vector)

        whole, last = divmod(tile.rows, lanes)
        if whole:
            with T.serial(whole) as group:
                rows_of(let(group * lanes), lanes)
        if last:
            rows_of(T.int32(whole * lanes), last)


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    return {name: (value,) for name, value in default_knobs(shape, isa).items()}


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    panels = _MOST_PANELS
    while panels > 1 and shape.n < panels * isa.panel * isa.least_blocks:
        panels //= 2
    return {"mr": lane_rows(shape.m, isa), "nv": panels * isa.vectors}
