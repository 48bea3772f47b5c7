"""Softmax attention of a block of rows over the cache, in two passes over the positions.

A block is one kv head and a few rows; all query heads of the kv head are computed together, so that
keys and values are read once for them. What a row's result is made of never depends on the block:
scores are sums over features in order; exponentials are summed by lane over blocks of 16 absolute
positions; values are added position by position. A position that a row does not see adds an exact
zero, so rows of a block may see different numbers of positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.attention.append import append_row
from slmtvm.schedules.attention.cache import widen
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.vector import LANES, Accumulators, Buffer, Expr

_UNROLL = 4  # features of a score, and positions of a weighted sum, in one round of a loop
_HIDDEN = -math.inf  # the score of a position that a row does not see


@dataclass(frozen=True)
class _Row:
    """A query head of a row: where its query and output begin, and the last position it sees."""

    query_at: Expr
    output_at: Expr
    last: Expr
    index: int  # its row of the scratch memory


@dataclass(frozen=True)
class _Scratch:
    """A thread's memory: a row of scores for each query, then the rows' maxima, then extra floats.

    Rows are a cache line longer than the capacity: at a multiple of 4096 bytes they would all fall
    into the same set of the cache.
    """

    rows: int
    capacity: int
    extra: int = 0

    @property
    def stride(self) -> int:
        return self.capacity + LANES

    @property
    def maxima(self) -> int:
        return self.rows * self.stride

    @property
    def extra_at(self) -> int:
        return self.maxima + -(-self.rows // LANES) * LANES

    @property
    def tensor(self) -> Tensor:
        return Tensor("scratch", (self.extra_at + self.extra,), "float32")


def rows_in_block(shape: AttentionShape) -> int:
    """Rows (tokens) of a block: as many as fill the accumulators, their group's heads included."""
    queries = max(1, min(shape.accumulators, 8))
    return min(shape.m, max(1, queries // shape.group))


def build_attend(shape: AttentionShape) -> Kernel:
    """(q, k_cache, v_cache) -> o float32 (m, num_heads * head_dim), after build_append's kernel.

    Its scalar is position, or valid for "bidirectional". One block for each kv head and
    ``rows_in_block`` rows.
    """
    count = rows_in_block(shape)
    blocks = -(-shape.m // count)
    scratch = _Scratch(count * shape.group, shape.capacity)
    tensors = (shape.q, *shape.cache, shape.o, scratch.tensor)

    def body(block: Expr, *arguments: Any) -> None:
        buffers = {t.name: a for t, a in zip(tensors, arguments, strict=False)}
        scalar = arguments[-1]
        head, first = T.bind(block // blocks), T.bind(block % blocks * count)
        queries: list[_Row] = []
        for i in range(count):
            # The last block may be short: it computes the last row again.
            row = T.bind(T.min(first + i, T.int32(shape.m - 1)))
            last = T.bind(scalar + row) if shape.causal else T.bind(scalar - 1)
            for member in range(shape.group):
                at = T.bind((row * shape.num_heads + head * shape.group + member) * shape.head_dim)
                queries.append(_Row(at, at, last, len(queries)))
        _attend(shape, buffers, head, queries, buffers["q"], scratch)

    return define(
        shape.name("attend"), tensors, body, grid=shape.num_kv_heads * blocks,
        outputs=["o"], scalars=shape.scalars, work=shape.work,
    )  # fmt: skip


def build_decode(shape: AttentionShape) -> Kernel:
    """(qkv, [cos, sin], k_cache, v_cache) -> o: append and attend in one kernel, for one token.

    Equal to build_append's and build_attend's kernels in every bit. One block for each kv head.
    """
    assert shape.m == 1 and shape.causal, shape
    d, group = shape.head_dim, shape.group
    scratch = _Scratch(group, shape.capacity, extra=group * d)
    tensors = (shape.qkv, *shape.tables, *shape.cache, shape.o, scratch.tensor)

    def body(head: Expr, *arguments: Any) -> None:
        buffers = {t.name: a for t, a in zip(tensors, arguments, strict=False)}
        position = arguments[-1]
        own = buffers["scratch"]
        append_row(shape, buffers, head, T.int32(0), position, own, T.int32(scratch.extra_at))
        queries = [
            _Row(
                T.int32(scratch.extra_at + i * d),
                T.bind((head * group + i) * d),
                position,
                i,
            )
            for i in range(group)
        ]
        _attend(shape, buffers, head, queries, own, scratch)

    return define(
        shape.name("decode"), tensors, body, grid=shape.num_kv_heads,
        outputs=["o"], state=[t.name for t in shape.cache], scalars=["position"], work=shape.work,
    )  # fmt: skip


def _attend(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    rows: Sequence[_Row],
    queries: Buffer,
    scratch: _Scratch,
) -> None:
    last = rows[-1].last  # rows are in order of position
    blocks = T.bind(last // LANES + 1)
    tiles = -(-len(rows) // max(1, min(shape.accumulators, 8)))
    size = -(-len(rows) // tiles)
    for at in range(0, len(rows), size):
        tile = rows[at : at + size]
        _scores(shape, buffers, head, tile, queries, scratch, blocks)
    with T.serial(0, len(rows)) as index:
        _softmax(shape, buffers["scratch"], index, scratch, blocks)
    for at in range(0, len(rows), size):
        _weighted_values(shape, buffers, head, rows[at : at + size], scratch, last + 1)


def _scores(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    rows: Sequence[_Row],
    queries: Buffer,
    scratch: _Scratch,
    blocks: Expr,
) -> None:
    """Unscaled scores of ``rows`` at all blocks of positions, and each row's largest."""
    maxima = Accumulators(len(rows), _HIDDEN)
    wide = max(1, shape.accumulators // len(rows))
    rounds = T.bind(blocks // wide)
    if wide > 1:
        with T.serial(0, rounds) as i:
            _score_tile(
                shape, buffers, head, rows, queries, scratch, T.bind(i * wide), wide, maxima
            )
    with T.serial(rounds * wide if wide > 1 else T.int32(0), blocks) as block:
        _score_tile(shape, buffers, head, rows, queries, scratch, block, 1, maxima)
    for i, row in enumerate(rows):
        largest = vec.across(maxima[i], vec.maximum)
        vec.store(buffers["scratch"], T.int32(scratch.maxima + row.index), largest, 1)


def _score_tile(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    rows: Sequence[_Row],
    queries: Buffer,
    scratch: _Scratch,
    first: Expr,
    width: int,
    maxima: Accumulators,
) -> None:
    """The scores of all ``rows`` at ``width`` blocks of positions from ``first`` on."""
    d, lanes_of_block = shape.head_dim, shape.head_dim * LANES
    start = T.bind((head * (shape.capacity // LANES) + first) * lanes_of_block)
    sums = Accumulators(len(rows) * width)

    def add_feature(feature: Expr) -> None:
        loaded = [vec.load(queries, row.query_at + feature, 1) for row in rows]
        for j in range(width):
            stored = vec.load(buffers["k_cache"], start + j * lanes_of_block + feature * LANES)
            key = widen(shape, stored)
            for i, query in enumerate(loaded):
                sums[i * width + j] = vec.fma(vec.splat(query), key, sums[i * width + j])

    with T.serial(0, d // _UNROLL) as i:
        for u in range(_UNROLL):
            add_feature(i * _UNROLL + u)
    for feature in range(d // _UNROLL * _UNROLL, d):
        add_feature(T.int32(feature))
    for j in range(width):
        place = T.bind((first + j) * LANES)
        positions = T.bind(T.ramp(place, 1, LANES))
        for i, row in enumerate(rows):
            seen = positions <= T.broadcast(row.last, LANES)
            score = T.bind(T.Select(seen, sums[i * width + j], vec.splat(_HIDDEN)))
            vec.store(buffers["scratch"], place + row.index * scratch.stride, score)
            maxima[i] = T.bind(vec.maximum(score, maxima[i]))


def _softmax(
    shape: AttentionShape, memory: Buffer, index: Expr, scratch: _Scratch, blocks: Expr
) -> None:
    """Scores of row ``index`` -> exp(scale * (score - max)); its maximum -> 1 / their sum."""
    largest = vec.splat(vec.load(memory, index + scratch.maxima, 1))
    start = T.bind(index * scratch.stride)
    total = Accumulators(1)
    with T.serial(0, blocks) as block:
        at = T.bind(start + block * LANES)
        below = T.bind(vec.load(memory, at) - largest)
        weight = vec.exp(T.bind(below * vec.splat(shape.scale)))
        vec.store(memory, at, weight)
        total[0] = T.bind(total[0] + weight)
    inverse = T.bind(T.float32(1.0) / vec.across(total[0], vec.add))
    vec.store(memory, index + scratch.maxima, inverse, 1)


def _weighted_values(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    rows: Sequence[_Row],
    scratch: _Scratch,
    count: Expr,
) -> None:
    """The outputs of ``rows``: values of the first ``count`` positions, weighted.

    No position from ``count`` on is read: what lies there may be anything, and zero times that is
    not always zero.
    """
    memory, values = buffers["scratch"], buffers["v_cache"]
    start = T.bind(head * (shape.capacity * shape.head_dim))
    width = max(1, shape.accumulators // len(rows))
    parts = list(vec.pieces(shape.head_dim))
    for chunk in (parts[i : i + width] for i in range(0, len(parts), width)):
        sums = [[Accumulators(1, lanes=lanes) for _, lanes in chunk] for _ in rows]

        def add_position(position: Expr, chunk: Any = chunk, sums: Any = sums) -> None:
            place = T.bind(start + position * shape.head_dim)
            loaded = [widen(shape, vec.load(values, place + at, lanes)) for at, lanes in chunk]
            for row, row_sums in zip(rows, sums, strict=True):
                weight = vec.load(memory, position + row.index * scratch.stride, 1)
                for (_, lanes), value, total in zip(chunk, loaded, row_sums, strict=True):
                    total[0] = vec.fma(vec.splat(weight, lanes), value, total[0])

        rounds = T.bind(count // _UNROLL)
        with T.serial(0, rounds) as i:
            for u in range(_UNROLL):
                add_position(T.bind(i * _UNROLL + u))
        with T.serial(rounds * _UNROLL, count) as position:
            add_position(position)
        for row, row_sums in zip(rows, sums, strict=True):
            inverse = vec.load(memory, T.int32(scratch.maxima + row.index), 1)
            for (at, lanes), total in zip(chunk, row_sums, strict=True):
                scaled = T.bind(total[0] * vec.splat(inverse, lanes))
                vec.store(buffers["o"], row.output_at + at, scaled, lanes)
