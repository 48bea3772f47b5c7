"""Scores of queries over blocks of 16 positions, and the softmax of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.attention.cache import widen
from slmtvm.schedules.attention.queries import Query, Scratch
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.vector import LANES, Accumulators, Buffer, Expr

_UNROLL = 4  # features of a score in one round of a loop
_HIDDEN = -math.inf  # the score of a position that a row does not see


@dataclass(frozen=True)
class Span:
    """Blocks ``begin .. end`` of 16 positions."""

    begin: Expr
    end: Expr


def compute_scores(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    queries: Sequence[Query],
    source: Buffer,
    memory: Buffer,
    scratch: Scratch,
    span: Span,
) -> None:
    """Scores (without the factor of ``softmax``) of ``queries`` in ``source`` at all blocks of
    ``span``, and each query's largest, into ``memory``.
    """
    maxima = Accumulators(len(queries), _HIDDEN)
    wide = max(1, shape.accumulators // len(queries))

    def tile(first: Expr, width: int) -> None:
        _score_tile(shape, buffers, head, queries, source, memory, scratch, first, width, maxima)

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
    first: Expr,
    width: int,
    maxima: Accumulators,
) -> None:
    """The scores of all ``queries`` at ``width`` blocks of positions from ``first`` on."""
    d, lanes_of_block = shape.head_dim, shape.head_dim * LANES
    start = T.bind((head * (shape.capacity // LANES) + first) * lanes_of_block)
    sums = Accumulators(len(queries) * width)

    def add_feature(feature: Expr) -> None:
        loaded = [vec.load(source, query.query_at + feature, 1) for query in queries]
        for j in range(width):
            stored = vec.load(buffers["k_cache"], start + j * lanes_of_block + feature * LANES)
            key = widen(shape, stored)
            for i, value in enumerate(loaded):
                sums[i * width + j] = vec.fma(vec.splat(value), key, sums[i * width + j])

    with T.serial(0, d // _UNROLL) as i:
        for u in range(_UNROLL):
            add_feature(i * _UNROLL + u)
    for feature in range(d // _UNROLL * _UNROLL, d):
        add_feature(T.int32(feature))
    for j in range(width):
        place = T.bind((first + j) * LANES)
        positions = T.bind(T.ramp(place, 1, LANES))
        scales = _scales(shape, buffers, "k_scale", head, place)
        limits = vec.load(buffers["limits"], place) if shape.limits else None
        for i, query in enumerate(queries):
            dot = sums[i * width + j]
            if scales is not None:
                dot = T.bind(dot * scales)
            whole = _complete(shape, buffers, query, place, dot)
            if limits is not None:
                # The limit comes first: a score that is no number stays so.
                whole = T.bind(vec.minimum(limits, whole))
            score = T.bind(T.Select(_seen(query, positions), whole, vec.splat(_HIDDEN)))
            vec.store(memory, place + query.index * scratch.stride, score)
            maxima[i] = T.bind(vec.maximum(score, maxima[i]))


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
    return shape.softcap > 0 or shape.bias_columns > 0 or bool(shape.roundings)


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
    shape: AttentionShape, buffers: dict[str, Buffer], name: str, head: Expr, place: Expr
) -> Expr | None:
    """The scales of keys or values at 16 positions from ``place`` on, where they have any."""
    if shape.kv_dtype != "int8":
        return None
    return vec.load(buffers[name], head * shape.capacity + place)


def softmax(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    scores: Buffer,
    scores_at: Expr,
    largest: Expr,
    weights_at: Expr,
    span: Span,
) -> Expr:
    """``scores`` from ``scores_at`` on -> exp(score - largest) in scratch; 1 / the sum of these.

    Where the results are rounded, that number is multiplied in first, and 1 takes its place.
    Scores that are not scaled yet are multiplied by the layer's scale. The scales of values that
    have any are multiplied in.
    """
    memory, largest = buffers["scratch"], vec.splat(largest)
    total = Accumulators(1)
    with T.serial(span.begin, span.end) as block:
        below = T.bind(vec.load(scores, scores_at + block * LANES) - largest)
        if not _is_scaled(shape):
            below = T.bind(below * vec.splat(shape.scale))
        weight = vec.exp(below)
        total[0] = T.bind(total[0] + weight)
        if not shape.weight_roundings:
            weight = _times_value_scales(shape, buffers, head, block, weight)
        vec.store(memory, weights_at + block * LANES, weight)
    inverse = T.bind(T.float32(1.0) / vec.across(total[0], vec.add))
    if not shape.weight_roundings:
        return inverse
    earlier = len(shape.roundings) + len(shape.sum_roundings)
    with T.serial(span.begin, span.end) as block:
        at = T.bind(weights_at + block * LANES)
        weight = T.bind(vec.load(memory, at) * vec.splat(inverse))
        for index in range(len(shape.weight_roundings)):
            weight = _rounded(buffers, earlier + index, weight)
        vec.store(memory, at, _times_value_scales(shape, buffers, head, block, weight))
    return T.float32(1.0)


def _times_value_scales(
    shape: AttentionShape, buffers: dict[str, Buffer], head: Expr, block: Expr, weight: Expr
) -> Expr:
    """``weight`` of 16 positions times the scales of their values, where those have any."""
    scales = _scales(shape, buffers, "v_scale", head, T.bind(block * LANES))
    return weight if scales is None else T.bind(weight * scales)
