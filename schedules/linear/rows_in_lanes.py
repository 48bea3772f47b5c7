"""Linear layers with free zeros in float32 weights, for many rows: a vector holds rows.

What ``floating`` computes, to the same bits: each element of y is one chain of fused multiply-adds
over the k whose weights are not zero, in order. A channel lists these weights and where in k they
are; the activations come turned, all rows of a k together, so that a weight is multiplied by whole
vectors of them wherever it is. Zero times infinity is no number, so behind the activations stands
whether all are finite: where they are not, a tile takes every k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.isa.base import Buffer, Expr, let, load, splat
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.linear import floating
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace
from slmtvm.schedules.linear.scheme import Weights
from slmtvm.schedules.linear.shape import IN_LISTS, LinearShape
from slmtvm.schedules.linear.tile import Registers, Store, Tile, split

MIN_ROWS = 16
"""Fewer fill too few vectors: the dense kernel takes them, with weights of its own."""

MAX_K = 1 << 16
"""Places are uint16."""

_MOST_ROWS = 32  # of a tile: activations of more leave the caches that are near
_NEAR_BYTES = 128 * 1024  # of a tile's activations, that a list reads in any order
_FAR = 1.8  # times as long a step takes where there are more: measured

_TURNED = 64  # of k, that a block turns

operands = floating.operands


def lane_rows(m: int, isa: Isa) -> int:
    """Rows of a tile, whole vectors."""
    return min(_MOST_ROWS, -(-m // isa.lanes) * isa.lanes)


def activations(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """xt as ``turning`` makes it."""
    return [_turned_tensor(shape.m, shape.k, isa)]


def _turned_tensor(m: int, k: int, isa: Isa) -> Tensor:
    """(row blocks, k, lane_rows), and behind each block's k the rows of ``_flag_rows``: 0 for each
    part of k, or NaN where some number of it is not finite; all numbers say it of some part."""
    rows = lane_rows(m, isa)
    return Tensor("xt", (-(-m // rows), k + _flag_rows(m, k, isa), rows), "float32")


def _flag_rows(m: int, k: int, isa: Isa) -> int:
    parts = -(-k // _TURNED)
    return -(-parts // lane_rows(m, isa))


def weight_tensors(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """starts int32 (n + 1): where in the other two a channel's list begins; places uint16: the k of
    each weight that is not zero; values float32."""
    return [
        Tensor("starts", (shape.n + 1,), "int32"),
        Tensor("places", (shape.n * shape.k,), "uint16", at_most=True),
        Tensor("values", (shape.n * shape.k,), "float32", at_most=True),
    ]


def pack(shape: LinearShape, isa: Isa, weights: Weights) -> list[np.ndarray]:
    """weight float32 (n, k)."""
    used = weights.weight != 0
    starts = np.concatenate([[0], used.sum(axis=1).cumsum()]).astype(np.int32)
    if not starts[-1]:  # an array has to hold something; no list has this weight
        used[0, 0] = True
    places = used.nonzero()[1].astype(np.uint16)
    return [starts, places, weights.weight[used].astype(np.float32)]


def relative_time(shape: LinearShape, isa: Isa, density: float) -> float:
    """What the kernel is expected to take, of the dense kernel's time."""
    assert isa.listed_rows is not None, isa.name
    near = 4 * lane_rows(shape.m, isa) * shape.k <= _NEAR_BYTES
    step = isa.listed_rows.step * (1 if near else _FAR)
    return density * step + isa.listed_rows.ends / shape.k


def bytes_left(density: float) -> float:
    """Bytes of the lists, of those of all weights."""
    return 1.5 * density


def layout(shape: LinearShape) -> str:
    """See ``linear.layout``."""
    return f"{IN_LISTS}-{shape.format}-f32"


def turning(m: int, k: int, isa: Isa) -> Kernel:
    """x float32 (m, k) -> xt as ``activations`` says; rows beyond m are zeros."""
    rows, lanes = lane_rows(m, isa), isa.lanes
    blocks, flag_rows = -(-k // _TURNED), _flag_rows(m, k, isa)
    stride = (k + flag_rows) * rows

    def body(block: Expr, x: Buffer, xt: Buffer) -> None:
        row_block, part = let(T.floordiv(block, blocks)), let(T.floormod(block, blocks))
        flags = T.alloc_buffer((lanes,), "float32", scope="local")
        T.buffer_store(flags, splat(0.0, "float32", lanes), [T.ramp(0, 1, lanes)])

        def turn(size: int) -> None:
            first = let(part * _TURNED)
            for begin in range(0, size // lanes * lanes, lanes):
                with T.serial(rows // lanes) as group:
                    _turn_square(x, xt, flags, let(row_block), let(group), let(first + begin))
            for rest in range(size // lanes * lanes, size):
                with T.serial(rows) as lane:
                    row = let(row_block * rows + lane)
                    to = row_block * stride + (first + rest) * rows + lane
                    with T.If(row < m):
                        with T.Then():
                            value = let(x[row * k + first + rest])
                            T.buffer_store(xt, value, [to])
                            T.buffer_store(flags, T.fma(value, T.float32(0), flags[0]), [0])
                        with T.Else():
                            T.buffer_store(xt, T.float32(0), [to])

        split(k, _TURNED, part, turn)
        flag = let(_sum_of(flags, lanes))
        # Several places say the same, so that each of the flags' rows is written whole.
        end = flag_rows * rows
        with T.serial(T.floordiv(end - 1 - part, blocks) + 1) as turn_of:
            to = row_block * stride + k * rows + part + turn_of * blocks
            T.buffer_store(xt, flag, [to])

    def _turn_square(
        x: Buffer, xt: Buffer, flags: Buffer, row_block: Expr, group: Expr, at: Expr
    ) -> None:
        every, zero = T.ramp(0, 1, lanes), splat(0.0, "float32", lanes)
        staged = T.alloc_buffer((lanes * lanes,), "float32", scope="local")
        for i in range(lanes):
            row = let(row_block * rows + group * lanes + i)
            place = T.ramp(i * lanes, 1, lanes)
            if m % rows == 0:
                T.buffer_store(staged, load(x, row * k + at, lanes), [place])
                continue
            with T.If(row < m):
                with T.Then():
                    T.buffer_store(staged, load(x, row * k + at, lanes), [place])
                with T.Else():
                    T.buffer_store(staged, zero, [place])
        square = [let(load(staged, i * lanes, lanes)) for i in range(lanes)]
        seen = let(load(flags, 0, lanes))
        for vector in square:
            seen = let(T.fma(vector, zero, seen))
        T.buffer_store(flags, seen, [every])
        turned = transposed(square, lanes)
        for i, vector in enumerate(turned):
            to = row_block * stride + (at + i) * rows + group * lanes
            T.buffer_store(xt, vector, [T.ramp(to, 1, lanes)])

    tensors = [Tensor("x", (m, k), "float32"), _turned_tensor(m, k, isa)]
    name = f"turn_rows_{isa.name}_m{m}_k{k}"
    return define(name, tensors, body, grid=-(-m // rows) * blocks, outputs=["xt"])


def _sum_of(vector: Buffer, lanes: int) -> Expr:
    total = vector[0]
    for lane in range(1, lanes):
        total = total + vector[lane]
    return total


def transposed(vectors: list[Expr], lanes: int) -> list[Expr]:
    """``lanes`` vectors (a power of two) as the rows of a matrix -> its columns: squares of blocks
    of _BLOCK lanes, whose elements x86 deals out by one instruction, then the blocks as wholes."""
    block = min(lanes, _BLOCK)
    inner = [_dealt(vectors[i : i + block], lanes, 1, block) for i in range(0, lanes, block)]
    columns = [_dealt([rows[j] for rows in inner], lanes, block, lanes) for j in range(block)]
    return [columns[i % block][i // block] for i in range(lanes)]


_BLOCK = 4


def _dealt(vectors: list[Expr], lanes: int, unit: int, width: int) -> list[Expr]:
    """Parts of ``width`` lanes, of units as many as there are vectors, as the rows of matrices of
    these -> the columns: as often as these can be halved, both halves are dealt into each other."""
    half = len(vectors) // 2
    orders = [
        [
            part + first + i // 2 * unit + i % 2 * lanes + j
            for part in range(0, lanes, width)
            for i in range(len(vectors))
            for j in range(unit)
        ]
        for first in (0, width // 2)
    ]
    count = len(vectors)
    while count > 1:
        pairs = zip(vectors[:half], vectors[half:], strict=True)
        vectors = [let(T.Shuffle([a, b], order)) for a, b in pairs for order in orders]
        count //= 2
    return vectors


def emit(
    shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    isa = tile.isa
    lanes, rows = isa.lanes, lane_rows(shape.m, isa)
    vectors = -(-tile.rows // lanes)
    staged = T.alloc_buffer((lanes * vectors * lanes,), "float32", scope="local")
    flag_rows = _flag_rows(shape.m, shape.k, isa)
    start = let(tile.first_row * (shape.k + flag_rows))  # of the row block in xt
    flag = let(_flag(named["xt"], let(start + shape.k * rows), flag_rows * rows, lanes))
    with T.serial(tile.channels) as channel:
        at = let(tile.channel(0) + channel)
        sums = Registers("float32", lanes, vectors)

        def add(k: Expr, weight: Expr, sums: Registers = sums) -> None:
            row = let(start + k * rows)
            wide = let(T.Broadcast(weight, lanes))
            for v in range(vectors):
                sums[v] = T.fma(load(named["xt"], row + v * lanes, lanes), wide, sums[v])

        begin, end = let(named["starts"][at]), let(named["starts"][at + 1])
        with T.If(flag == T.float32(0)):
            with T.Then(), T.serial(begin, end) as index:
                add(let(T.Cast("int32", named["places"][index])), named["values"][index])
            with T.Else():
                _add_every_k(shape, named, begin, end, add)
        for v in range(vectors):
            to = (v * lanes + channel) * lanes
            T.buffer_store(staged, sums[v], [T.ramp(to, 1, lanes)])
    for channel in range(tile.channels, lanes):
        for v in range(vectors):
            zero = splat(0.0, "float32", lanes)
            T.buffer_store(staged, zero, [T.ramp((v * lanes + channel) * lanes, 1, lanes)])

    def write(first: Expr, rows: list[Expr]) -> None:
        for i, vector in enumerate(rows):
            store.add_and_write(tile, first + i, 0, floating.unsigned_zero(vector))

    by_rows(staged, tile.rows, lanes, write)


def by_rows(
    staged: Buffer, rows: int, lanes: int, write: Callable[[Expr, list[Expr]], None]
) -> None:
    """``write(first, vectors)`` for each ``lanes`` of ``rows`` rows: the channels of these rows,
    of sums that ``staged`` has with rows in lanes, ``lanes`` channels for each vector of rows."""

    def turned(first: Expr, count: int) -> None:
        square = [let(load(staged, (first + i) * lanes, lanes)) for i in range(lanes)]
        write(first, transposed(square, lanes)[:count])

    whole, last = divmod(rows, lanes)
    if whole:
        with T.serial(whole) as group:
            turned(let(group * lanes), lanes)
    if last:
        turned(T.int32(whole * lanes), last)


def _flag(xt: Buffer, at: Expr, count: int, lanes: int) -> Expr:
    """The sum of ``count`` numbers of ``xt``, whole vectors, from ``at`` on."""
    total = let(load(xt, at, lanes))
    for i in range(lanes, count, lanes):
        total = let(total + load(xt, at + i, lanes))
    kept = T.alloc_buffer((lanes,), "float32", scope="local")
    T.buffer_store(kept, total, [T.ramp(0, 1, lanes)])
    return _sum_of(kept, lanes)


def _add_every_k(
    shape: LinearShape,
    named: Mapping[str, Buffer],
    begin: Expr,
    end: Expr,
    add: Callable[[Expr, Expr], None],
) -> None:
    """What a channel's list from ``begin`` to ``end`` adds, and the zeros between."""
    place = T.alloc_buffer((1,), "int32", scope="local")
    weight = T.alloc_buffer((1,), "float32", scope="local")
    T.buffer_store(place, begin, [0])
    with T.serial(shape.k) as k:
        T.buffer_store(weight, T.float32(0), [0])
        with T.If(place[0] < end), T.Then():
            listed = let(T.Cast("int32", named["places"][place[0]]))
            with T.If(listed == k), T.Then():
                T.buffer_store(weight, named["values"][place[0]], [0])
                T.buffer_store(place, place[0] + 1, [0])
        add(let(k), weight[0])


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    return {"mr": (lane_rows(shape.m, isa),), "nv": (1,)}


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    return {"mr": lane_rows(shape.m, isa), "nv": 1}
