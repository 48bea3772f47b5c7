"""Sums of values weighted by the softmax of scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.attention.cache import widen
from slmtvm.schedules.attention.queries import Query, Scratch
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.vector import Accumulators, Buffer, Expr

_UNROLL = 4  # positions of a weighted sum in one round of a loop


@dataclass(frozen=True)
class Features:
    """``count`` features of a head from ``first`` on."""

    first: Expr
    count: int


def weigh_values(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    queries: Sequence[Query],
    scratch: Scratch,
    features: Features,
) -> None:
    """The outputs of ``queries``, which are in order of position: the values they see, weighted.

    In scratch lie a row of weights for each query and, where its maximum was, their factor.

    What a query does not see is not added to it with a weight of zero: it may be anything, such as
    what a padded row has left, and zero times that is not always zero.
    """
    memory, values = buffers["scratch"], buffers["v_cache"]
    start = T.bind(head * (shape.capacity * shape.head_dim) + features.first)
    width = max(1, shape.accumulators // len(queries))
    parts = list(vec.pieces(features.count))
    span = _span(queries)
    for chunk in (parts[i : i + width] for i in range(0, len(parts), width)):
        sums = [[Accumulators(1, lanes=lanes) for _, lanes in chunk] for _ in queries]

        def add_position(
            position: Expr, seen_by_all: bool = True, chunk: Any = chunk, sums: Any = sums
        ) -> None:
            place = T.bind(start + position * shape.head_dim)
            loaded = [widen(shape, vec.load(values, place + at, lanes)) for at, lanes in chunk]
            for query, query_sums in zip(queries, sums, strict=True):
                weight = vec.load(memory, position + query.index * scratch.stride, 1)
                seen = None if seen_by_all else T.bind(_sees(query, position))
                for (_, lanes), value, total in zip(chunk, loaded, query_sums, strict=True):
                    more = vec.fma(vec.splat(weight, lanes), value, total[0])
                    if seen is not None:
                        more = T.bind(T.Select(vec.splat(seen, lanes), more, total[0]))
                    total[0] = more

        if span.shared_begin is not span.begin:
            with T.serial(span.begin, span.shared_begin) as position:
                add_position(position, seen_by_all=False)
        rounds = T.bind((span.shared_end - span.shared_begin) // _UNROLL)
        with T.serial(0, rounds) as i:
            for u in range(_UNROLL):
                add_position(T.bind(span.shared_begin + i * _UNROLL + u))
        rest = T.bind(span.shared_begin + rounds * _UNROLL)
        with T.serial(rest, span.shared_end) as position:
            add_position(position)
        if span.shared_end is not span.end:
            with T.serial(span.shared_end, span.end) as position:
                add_position(position, seen_by_all=False)
        for query, query_sums in zip(queries, sums, strict=True):
            inverse = vec.load(memory, query.maximum_at, 1)
            for (at, lanes), total in zip(chunk, query_sums, strict=True):
                scaled = T.bind(total[0] * vec.splat(inverse, lanes))
                vec.store(buffers["o"], query.output_at + features.first + at, scaled, lanes)


@dataclass(frozen=True)
class _Span:
    """The positions that some queries see, and those among them that all see."""

    begin: Expr
    shared_begin: Expr
    shared_end: Expr
    end: Expr


def _span(queries: Sequence[Query]) -> _Span:
    first, last = queries[0], queries[-1]
    begin = T.int32(0) if first.first is None else first.first
    end = T.bind(last.last + 1)
    if first.last is last.last:  # of one row, or all see the same
        return _Span(begin, begin, end, end)
    shared_end = T.bind(first.last + 1)
    shared_begin = begin if last.first is None else T.bind(T.min(last.first, shared_end))
    return _Span(begin, shared_begin, shared_end, end)


def _sees(query: Query, position: Expr) -> Expr:
    seen = position <= query.last
    return seen if query.first is None else T.And(seen, query.first <= position)
