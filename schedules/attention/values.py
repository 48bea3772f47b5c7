"""Sums of values weighted by the softmax of scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.attention.cache import load_value, row_width, slot_after
from slmtvm.schedules.attention.queries import Query, Scratch
from slmtvm.schedules.attention.scores import Span
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.attention.walk import Walk
from slmtvm.schedules.order import set_apart
from slmtvm.schedules.vector import LANES, Accumulators, Buffer, Expr

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
    walk: Span | Walk,
) -> None:
    """The outputs of ``queries``, which are in order of position: the values they see, weighted.

    In scratch lie a row of weights for each query and, where its maximum was, their factor.

    What a query does not see is not added to it with a weight of zero: it may be anything, such as
    what a padded row has left, and zero times that is not always zero.
    """
    memory, values = buffers["scratch"], buffers["v_cache"]
    width_of_row = row_width(shape)
    start = T.bind(head * (shape.kept * width_of_row))
    width = max(1, shape.accumulators // len(queries))
    parts = list(vec.pieces(features.count))
    add_seen = _over_list if isinstance(walk, Walk) else _over_span
    for chunk in (parts[i : i + width] for i in range(0, len(parts), width)):
        sums = [[Accumulators(1, lanes=lanes) for _, lanes in chunk] for _ in queries]

        def add_position(
            slot: Expr, kept_at: Expr, seen: _Sees | None, chunk: Any = chunk, sums: Any = sums
        ) -> None:
            row = T.bind(start + slot * width_of_row)
            loaded = [
                load_value(shape, values, row, features.first + at, lanes) for at, lanes in chunk
            ]
            if shape.kv_dtype == "int4":
                scales = [
                    vec.splat(_scale(shape, buffers, head, slot, features.first + at), lanes)
                    for at, lanes in chunk
                ]
                loaded = [T.bind(v * s) for v, s in zip(loaded, scales, strict=True)]
            for query, query_sums in zip(queries, sums, strict=True):
                weight = vec.load(memory, kept_at + query.index * scratch.stride, 1)
                sees = None if seen is None else seen(query)
                for (_, lanes), value, total in zip(chunk, loaded, query_sums, strict=True):
                    more = vec.fma(vec.splat(weight, lanes), value, total[0])
                    if sees is not None:
                        more = T.bind(T.Select(vec.splat(sees, lanes), more, total[0]))
                    total[0] = more

        add_seen(shape, queries, walk, add_position)
        for query, query_sums in zip(queries, sums, strict=True):
            inverse = vec.load(memory, query.maximum_at, 1)
            for (at, lanes), total in zip(chunk, query_sums, strict=True):
                scaled = T.bind(total[0] * vec.splat(inverse, lanes))
                vec.store(buffers["o"], query.output_at + features.first + at, scaled, lanes)


_Sees = Callable[[Query], Expr]
_AddPosition = Callable[[Expr, Expr, _Sees | None], None]
"""Adds the value in a slot of the cache, whose weight has its place in memory, to what sees it."""


def _over_span(
    shape: AttentionShape, queries: Sequence[Query], _walk: Span | Walk, add: _AddPosition
) -> None:
    """``add`` each position that some of the queries see, where these follow each other."""
    span = _span(queries)
    slot_of = slot_after(shape, span.begin)

    def add_position(position: Expr, *, seen_by_all: bool = True) -> None:
        slot = slot_of(position)
        add(slot, slot, None if seen_by_all else lambda query: T.bind(_sees(query, position)))

    if span.shared_begin is not span.begin:
        with T.serial(span.begin, span.shared_begin) as position:
            add_position(position, seen_by_all=False)
    rounds = T.bind((span.shared_end - span.shared_begin) // _UNROLL)
    if shape.apart:
        set_apart()
    with T.serial(0, rounds) as i:
        for u in range(_UNROLL):
            add_position(T.bind(span.shared_begin + i * _UNROLL + u))
    rest = T.bind(span.shared_begin + rounds * _UNROLL)
    with T.serial(rest, span.shared_end) as position:
        add_position(position)
    if span.shared_end is not span.end:
        with T.serial(span.shared_end, span.end) as position:
            add_position(position, seen_by_all=False)


def _over_list(
    shape: AttentionShape, queries: Sequence[Query], walk: Span | Walk, add: _AddPosition
) -> None:
    """``add`` each position of the blocks of a list that some of the queries see."""
    assert isinstance(walk, Walk)
    with T.serial(walk.begin, walk.end) as index:
        place = T.bind(walk.block(index) * LANES)
        kept_at = T.bind(walk.memory(index) * LANES)
        within = T.bind(place + (LANES - 1) <= queries[-1].last)
        whole = T.bind(T.And(walk.is_whole(index) > 0, within))
        with T.If(whole):
            with T.Then(), T.serial(0, LANES // _UNROLL) as i:
                for u in range(_UNROLL):
                    at = T.bind(i * _UNROLL + u)
                    add(T.bind(place + at), T.bind(kept_at + at), None)
            with T.Else():
                words = {query.index: walk.bits(query, index, place) for query in queries}
                with T.serial(0, LANES) as at:

                    def sees(query: Query, at: Expr = at) -> Expr:
                        bit = T.bitwise_and(T.shift_right(words[query.index], at), T.int32(1))
                        return T.bind(T.bind(bit) > T.int32(0))

                    add(T.bind(place + at), T.bind(kept_at + at), sees)


def _scale(
    shape: AttentionShape, buffers: dict[str, Buffer], head: Expr, slot: Expr, feature: Expr
) -> Expr:
    """The scale of a value's group that has ``feature``."""
    groups = shape.scale_groups
    at = (head * shape.kept + slot) * groups + feature // shape.scale_group
    return vec.load(buffers["v_scale"], T.bind(at), 1)


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
