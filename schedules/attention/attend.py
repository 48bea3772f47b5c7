"""Softmax attention of a block of rows over the cache, in two passes over the positions.

A block is one kv head and a few rows; all query heads of the kv head are computed together, so that
keys and values are read once for them. What a row's result is made of never depends on the block:
scores are sums over features in order; exponentials are summed by lane over blocks of 16 absolute
positions; values are added position by position. A position that a row does not see adds an exact
zero, so rows of a block may see different positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.attention.append import append_row
from slmtvm.schedules.attention.queries import Query, Scratch
from slmtvm.schedules.attention.scores import Span, compute_scores, softmax
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.attention.tile import rows_in_block, tile_queries
from slmtvm.schedules.attention.values import Features, weigh_values
from slmtvm.schedules.attention.walk import Walk, walk
from slmtvm.schedules.isa.base import prefetch
from slmtvm.schedules.kernel import Kernel, define
from slmtvm.schedules.vector import LANES, Buffer, Expr


def build_attend(shape: AttentionShape) -> Kernel:
    """(q, [bias], [lists], [sinks], [limits], [numbers], the cache) -> o.

    o: float32 (m, num_heads * head_dim).

    It comes after build_append's. Its scalar is position, or valid for "bidirectional". One block
    for each kv head and ``rows_in_block`` rows.
    """
    count = rows_in_block(shape)
    blocks = -(-shape.m // count)
    scratch = Scratch(count * shape.group, shape.scored)
    tensors = (
        shape.q,
        *shape.bias,
        *shape.lists,
        *shape.sinks,
        *shape.limits,
        *shape.constants,
        *shape.cache,
        shape.o,
        scratch.tensor,
    )

    def body(block: Expr, *arguments: Any) -> None:
        buffers = {t.name: a for t, a in zip(tensors, arguments, strict=False)}
        scalar, *_ = arguments[len(tensors) :]
        head, first = T.bind(block // blocks), T.bind(block % blocks * count)
        if not shape.padded:
            rows_from(first, head, buffers, scalar)
            return
        with T.If(first < arguments[-1]):
            with T.Then():
                rows_from(first, head, buffers, scalar)
            with T.Else():
                _clear(shape, buffers["o"], head, first, count)

    def rows_from(first: Expr, head: Expr, buffers: dict[str, Buffer], scalar: Expr) -> None:
        queries: list[Query] = []
        seen_by_all = None if shape.causal else T.bind(scalar - 1)
        for i in range(count):
            # The last block may be short: it computes the last row again.
            row = T.bind(T.min(first + i, T.int32(shape.m - 1)))
            position = T.bind(scalar + row) if shape.causal else row
            last = position if seen_by_all is None else seen_by_all
            start = T.bind((row * shape.num_heads + head * shape.group) * shape.head_dim)
            queries += group_queries(
                shape, head, position, last, start, start, T.int32(len(queries)), scratch.maxima,
                queries[0] if queries else None,
            )  # fmt: skip
        _attend(shape, buffers, head, queries, buffers["q"], scratch)

    return define(
        shape.name("attend"), tensors, body, grid=shape.num_kv_heads * blocks,
        outputs=["o"], scalars=shape.scalars, work=shape.work,
    )  # fmt: skip


def _clear(shape: AttentionShape, o: Buffer, head: Expr, first: Expr, count: int) -> None:
    """Makes what a block would write 0."""
    width = shape.group * shape.head_dim
    with T.serial(T.min(T.int32(count), shape.m - first)) as i:
        start = T.bind(((first + i) * shape.num_kv_heads + head) * width)
        vec.store_zeros(o, start, width)


def build_decode(shape: AttentionShape) -> Kernel:
    """What build_append takes, [bias], [lists], [sinks], [limits], [numbers], the cache -> o.

    For one token: both kernels in one, and equal to them in every bit. One block for each kv head.
    """
    assert shape.m == 1 and shape.cached, shape
    d, group = shape.head_dim, shape.group
    scratch = Scratch(group, shape.scored, extra=group * d)
    tensors = (
        *shape.inputs,
        *shape.bias,
        *shape.lists,
        *shape.sinks,
        *shape.limits,
        *shape.constants,
        *shape.cache,
        shape.o,
        scratch.tensor,
    )

    def body(head: Expr, *arguments: Any) -> None:
        buffers = {t.name: a for t, a in zip(tensors, arguments, strict=False)}
        position = arguments[-1]
        own, start = buffers["scratch"], T.int32(scratch.extra_at)
        append_row(shape, buffers, head, T.int32(0), position, own, start)
        output_at = T.bind(head * (group * d))
        queries = group_queries(
            shape, head, position, position, start, output_at, T.int32(0), scratch.maxima
        )
        _attend(shape, buffers, head, queries, own, scratch)

    return define(
        shape.name("decode"), tensors, body, grid=shape.num_kv_heads,
        outputs=["o"], state=[t.name for t in shape.cache], scalars=["position"], work=shape.work,
    )  # fmt: skip


def group_queries(
    shape: AttentionShape,
    head: Expr,
    position: Expr,
    last: Expr,
    query_at: Expr,
    output_at: Expr,
    index: Expr,
    maxima: Expr,
    leader: Query | None = None,
) -> list[Query]:
    """The queries of one row that share kv head ``head``; ``leader`` is the first one of its block.

    Their first is row ``index`` of the memory for scores; the maxima of rows lie from ``maxima``.
    """
    first = None
    if shape.window:
        first = T.bind(T.max(position - (shape.window - 1), T.int32(0)))
    if shape.chunk:
        # Padding rows of an encoder see what the last token sees.
        own = position if shape.causal else T.min(position, last)
        first = T.bind(own // shape.chunk * shape.chunk)
        if not shape.causal:
            last = T.bind(T.min(first + (shape.chunk - 1), last))
    tile = tile_row = None
    if shape.blocks is not None:
        # Padding rows of an encoder see what the last token sees, and so do not read other lists.
        own = position if shape.causal else T.bind(T.min(position, last))
        tile = T.bind(own // LANES)
        if leader is not None and leader.tile is not None:
            tile = leader.tile
        tile_row = T.bind(own - tile * LANES)
    queries = []
    for i in range(shape.group):
        bias_at = None
        if shape.bias_columns:
            of_head = (head * shape.group + i) * shape.bias_columns
            first_key = of_head if shape.bias_by_key else of_head + shape.bias_zero - position
            bias_at = T.bind(first_key)
        offset = i * shape.head_dim
        queries.append(
            Query(
                T.bind(query_at + offset), T.bind(output_at + offset), first, last, bias_at,
                T.bind(index + i), T.bind(index + i + maxima), tile, tile_row, i,
            )
        )  # fmt: skip
    return queries


def walk_of(
    shape: AttentionShape, buffers: dict[str, Buffer], head: Expr, queries: Sequence[Query]
) -> Span | Walk:
    """The blocks of positions that some of the queries see; they are in order of position."""
    if shape.blocks is not None:
        return walk(shape, buffers, head, queries[-1])
    return visible_span(shape, queries)


def visible_span(shape: AttentionShape, queries: Sequence[Query]) -> Span:
    """``walk_of`` where what is seen lies together."""
    first, last = queries[0].first, queries[-1].last
    begin = T.int32(0) if first is None else T.bind(first // LANES)
    return Span(shape, begin, T.bind(last // LANES + 1))


def _attend(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    queries: Sequence[Query],
    source: Buffer,
    scratch: Scratch,
) -> None:
    memory = buffers["scratch"]
    span = walk_of(shape, buffers, head, queries)
    size = tile_queries(shape)
    for at in range(0, len(queries), size):
        tile = queries[at : at + size]
        compute_scores(shape, buffers, head, tile, source, memory, scratch, span)
    if shape.rows_ahead:
        _ask_ahead(shape, source, buffers["o"], queries)
    with T.serial(0, len(queries)) as index:
        row, largest_at = T.bind(index * scratch.stride), T.bind(index + scratch.maxima)
        largest = vec.load(memory, largest_at, 1)
        inverse = softmax(
            shape, buffers, head, T.bind(index % shape.group), memory, row, largest, row, span
        )
        vec.store(memory, largest_at, inverse, 1)
    features = Features(T.int32(0), shape.head_dim)
    for at in range(0, len(queries), size):
        weigh_values(shape, buffers, head, queries[at : at + size], scratch, features, span)


def _ask_ahead(
    shape: AttentionShape, source: Buffer, output: Buffer, queries: Sequence[Query]
) -> None:
    """Prefetches what the next rows read of ``source``, and where those of ``queries`` write.

    A row has a few cache lines of each head, far from those of the row before it: no prefetcher of
    a core foresees them. Until they are needed there is a softmax to compute, and values.
    """
    further = len(queries) // shape.group * (shape.num_heads * shape.head_dim)
    with T.serial(0, -(-shape.head_dim // LANES)) as line:
        at = T.bind(line * LANES)
        for query in queries:
            prefetch(source, query.query_at + further + at)
            prefetch(output, query.output_at + at)
