"""Scores of queries over blocks of 16 positions, and the softmax of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.attention.cache import block_slot, load_key_pair, row_width, widen
from slmtvm.schedules.attention.queries import Query, Scratch
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.attention.walk import Walk
from slmtvm.schedules.isa.base import prefetch
from slmtvm.schedules.vector import LANES, Accumulators, Buffer, Expr

_UNROLL = 4  # features of a score in one round of a loop
_AHEAD_BYTES = 2048  # how far keys are prefetched
_LINE_BYTES = 64
_HIDDEN = -math.inf  # the score of a position that a row does not see


@dataclass(frozen=True)
class Span:
    """Blocks ``begin .. end`` of 16 positions, that follow each other."""

    shape: AttentionShape
    begin: Expr
    end: Expr

    def block(self, index: Expr) -> Expr:
        """The block at ``index``."""
        return index

    def memory(self, index: Expr) -> Expr:
        """Which 16 of the memory for scores are for it."""
        return block_slot(self.shape, index)

    def stored(self, index: Expr) -> Expr:
        """Which block of the cache it is."""
        return block_slot(self.shape, index)

    def seen(self, query: Query, index: Expr, place: Expr) -> Expr:
        """Which of the 16 positions from ``place`` on the query sees."""
        return _seen(query, T.bind(T.ramp(place, 1, LANES)))


def compute_scores(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    queries: Sequence[Query],
    source: Buffer,
    memory: Buffer,
    scratch: Scratch,
    span: Span | Walk,
) -> None:
    """Scores (without the factor of ``softmax``) of ``queries`` in ``source`` at all blocks of
    ``span``, and each query's largest, into ``memory``.
    """
    maxima = Accumulators(len(queries), _HIDDEN)
    wide = max(1, shape.accumulators // len(queries))

    def tile(first: Expr, width: int) -> None:
        _score_tile(
            shape, buffers, head, queries, source, memory, scratch, span, first, width, maxima
        )

    done = span.begin
    if wide > 1:
        rounds = T.bind((span.end - span.begin) // wide)
        with T.serial(0, rounds) as i:
            tile(T.bind(span.begin + i * wide), wide)
        done = T.bind(span.begin + rounds * wide)
    with T.serial(done, span.end) as block:
        tile(block, 1)
    for i, query in enumerate(queries):
        largest = vec.across(maxima[i], vec.maximum)
        vec.store(memory, query.maximum_at, largest, 1)


def _score_tile(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    queries: Sequence[Query],
    source: Buffer,
    memory: Buffer,
    scratch: Scratch,
    span: Span | Walk,
    first: Expr,
    width: int,
    maxima: Accumulators,
) -> None:
    """The scores of all ``queries`` at ``width`` blocks of ``span`` from its ``first`` on."""
    d, lanes_of_block = shape.head_dim, row_width(shape) * LANES
    blocks = shape.kept // LANES
    slots = [span.stored(T.bind(first + j)) for j in range(width)]
    if shape.ring or shape.blocks is not None:  # they need not follow each other
        starts = [T.bind((head * blocks + slot) * lanes_of_block) for slot in slots]
    else:
        start = T.bind((head * blocks + first) * lanes_of_block)
        starts = [start + j * lanes_of_block for j in range(width)]
    sums = Accumulators(len(queries) * width)

    def add(feature: Expr, keys: Sequence[Expr]) -> None:
        loaded = [vec.load(source, query.query_at + feature, 1) for query in queries]
        for j, key in enumerate(keys):
            for i, value in enumerate(loaded):
                sums[i * width + j] = vec.fma(vec.splat(value), key, sums[i * width + j])

    stored = buffers["k_cache"]
    row_bytes = LANES * {"float32": 4, "float16": 2}.get(shape.kv_dtype, 1)
    every = max(1, _LINE_BYTES // row_bytes)

    def ask_ahead(row: Expr, member: int) -> None:
        if shape.ahead and member % every == 0:
            for start in starts:
                prefetch(stored, start + row * LANES + _AHEAD_BYTES * LANES // row_bytes)

    def add_feature(feature: Expr, member: int) -> None:
        ask_ahead(feature, member)
        places = (starts[j] + feature * LANES for j in range(width))
        add(feature, [widen(shape, vec.load(stored, at)) for at in places])

    def add_pair(pair: Expr, member: int, scales: Sequence[Expr]) -> None:
        ask_ahead(pair, member)
        places = (starts[j] + pair * LANES for j in range(width))
        pairs = [load_key_pair(stored, at) for at in places]
        for half in range(2):
            keys = [T.bind(p[half] * s) for p, s in zip(pairs, scales, strict=True)]
            add(T.bind(pair * 2 + half), keys)

    if shape.kv_dtype != "int4":
        _unrolled(0, d, _UNROLL, add_feature)
    else:
        size = shape.scale_group // 2
        for group in range(shape.scale_groups):
            at = T.bind((head * shape.scale_groups + group) * shape.kept)
            by_block = [vec.load(buffers["k_scale"], at + slot * LANES) for slot in slots]

            def add_scaled(pair: Expr, member: int, scales: Sequence[Expr] = by_block) -> None:
                add_pair(pair, member, scales)

            _unrolled(group * size, (group + 1) * size, _UNROLL // 2, add_scaled)
    for j in range(width):
        index = T.bind(first + j)
        place = T.bind(span.block(index) * LANES)
        slot, kept_at = (T.bind(b * LANES) for b in (slots[j], span.memory(index)))
        scales = _scales(shape, buffers, "k_scale", head, slot)
        limits = vec.load(buffers["limits"], place) if shape.limits else None
        for i, query in enumerate(queries):
            dot = sums[i * width + j]
            if scales is not None:
                dot = T.bind(dot * scales)
            whole = _complete(shape, buffers, query, place, dot)
            if limits is not None:
                # The limit comes first: a score that is no number stays so.
                whole = T.bind(vec.minimum(limits, whole))
            seen = span.seen(query, index, place)
            score = T.bind(T.Select(seen, whole, vec.splat(_HIDDEN)))
            vec.store(memory, kept_at + query.index * scratch.stride, score)
            maxima[i] = T.bind(vec.maximum(score, maxima[i]))


def _unrolled(begin: int, end: int, unroll: int, add: Callable[[Expr, int], None]) -> None:
    """``add`` for each number from ``begin`` to ``end``, in order, ``unroll`` in one round: it is
    told which of a round it is, too."""
    rounds = (end - begin) // unroll
    with T.serial(0, rounds) as i:
        for u in range(unroll):
            add(i * unroll + (begin + u), u)
    for rest in range(begin + rounds * unroll, end):
        add(T.int32(rest), 0)


def _seen(query: Query, positions: Expr) -> Expr:
    """Which of 16 positions the query sees."""
    if query.first is None:
        return positions <= T.broadcast(query.last, LANES)
    # One comparison for both ends: what lies before the first is far ahead as an unsigned number.
    ahead = T.bind(positions - T.broadcast(query.first, LANES))
    count = T.bind(T.cast(query.last - query.first, "uint32"))
    return T.reinterpret(f"uint32x{LANES}", ahead) <= T.broadcast(count, LANES)


def _is_scaled(shape: AttentionShape) -> bool:
    """Whether scores are scaled as they are computed, not just before their exponential."""
    has_more = shape.bias_columns > 0 or shape.has_sinks
    return shape.softcap > 0 or has_more or bool(shape.roundings)


def _complete(
    shape: AttentionShape, buffers: dict[str, Buffer], query: Query, place: Expr, dot: Expr
) -> Expr:
    """The scores at 16 positions from ``place`` on, from the dot products with their keys."""
    if not _is_scaled(shape):
        return dot
    factor = shape.scale
    for index in range(len(shape.roundings)):
        dot = _rounded(buffers, index, dot)
    if shape.softcap:
        dot = vec.tanh(T.bind(dot * vec.splat(shape.scale / shape.softcap)))
        factor = shape.softcap
    if query.bias_at is None:
        total = T.bind(dot * vec.splat(factor))
    else:
        bias = vec.load(buffers["bias"], query.bias_at + place)
        total = vec.fma(dot, vec.splat(factor), bias)
    for index in range(len(shape.sum_roundings)):
        total = _rounded(buffers, len(shape.roundings) + index, total)
    return total


def _rounded(buffers: dict[str, Buffer], index: int, x: Expr) -> Expr:
    """The rounding ``index`` of the shape's, of all three kinds in order, with its factor."""
    factor, scale, low, high = (
        vec.load(buffers["numbers"], T.int32(4 * index + i), 1) for i in range(4)
    )
    return vec.rounded(T.bind(x * vec.splat(factor)), scale, low, high)


def _scales(
    shape: AttentionShape, buffers: dict[str, Buffer], name: str, head: Expr, slot: Expr
) -> Expr | None:
    """The scales of the 16 keys or values from the slot ``slot`` on, where they have any."""
    if shape.kv_dtype != "int8":
        return None
    return vec.load(buffers[name], head * shape.kept + slot)


def softmax(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    member: Expr,
    scores: Buffer,
    scores_at: Expr,
    largest: Expr,
    weights_at: Expr,
    span: Span | Walk,
) -> Expr:
    """``scores`` from ``scores_at`` on -> exp(score - largest) in scratch; 1 / the sum of these.

    Where the results are rounded, that number is multiplied in first, and 1 takes its place.
    Scores that are not scaled yet are multiplied by the layer's scale. The scales of values that
    have any are multiplied in. ``member``: which query head of kv head ``head``'s it is.
    """
    memory, sink = buffers["scratch"], None
    if shape.has_sinks:
        sink = vec.load(buffers["sinks"], T.bind(head * shape.group + member), 1)
        largest = T.bind(vec.maximum(sink, largest))
    largest = vec.splat(largest)
    total = Accumulators(1)
    with T.serial(span.begin, span.end) as index:
        block = span.memory(index)
        below = T.bind(vec.load(scores, scores_at + block * LANES) - largest)
        if not _is_scaled(shape):
            below = T.bind(below * vec.splat(shape.scale))
        weight = vec.exp(below)
        total[0] = T.bind(total[0] + weight)
        if not shape.weight_roundings:
            weight = _times_value_scales(shape, buffers, head, span.stored(index), weight)
        vec.store(memory, weights_at + block * LANES, weight)
    whole = vec.across(total[0], vec.add)
    if sink is not None:
        rest = vec.exp(T.bind(vec.splat(sink) - largest))
        whole = T.bind(whole + vec.take_lanes(rest, 0, 1))
    inverse = T.bind(T.float32(1.0) / whole)
    if not shape.weight_roundings:
        return inverse
    earlier = len(shape.roundings) + len(shape.sum_roundings)
    with T.serial(span.begin, span.end) as index:
        block = span.memory(index)
        at = T.bind(weights_at + block * LANES)
        weight = T.bind(vec.load(memory, at) * vec.splat(inverse))
        for rounding in range(len(shape.weight_roundings)):
            weight = _rounded(buffers, earlier + rounding, weight)
        vec.store(memory, at, _times_value_scales(shape, buffers, head, span.stored(index), weight))
    return T.float32(1.0)


def _times_value_scales(
    shape: AttentionShape, buffers: dict[str, Buffer], head: Expr, block: Expr, weight: Expr
) -> Expr:
    """``weight`` of 16 positions times their values' scales, where they have any."""
    scales = _scales(shape, buffers, "v_scale", head, T.bind(block * LANES))
    return weight if scales is None else T.bind(weight * scales)
