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
    begin: Expr,
    end: Expr,
    features: Features,
) -> None:
    """The outputs of ``queries``: values of the positions ``begin .. end``, weighted.

    In scratch lie a row of weights for each query and, where its maximum was, their factor.

    No position from ``end`` on is read: what lies there may be anything, and zero times that is
    not always zero.
    """
    memory, values = buffers["scratch"], buffers["v_cache"]
    start = T.bind(head * (shape.capacity * shape.head_dim) + features.first)
    width = max(1, shape.accumulators // len(queries))
    parts = list(vec.pieces(features.count))
    for chunk in (parts[i : i + width] for i in range(0, len(parts), width)):
        sums = [[Accumulators(1, lanes=lanes) for _, lanes in chunk] for _ in queries]

        def add_position(position: Expr, chunk: Any = chunk, sums: Any = sums) -> None:
            place = T.bind(start + position * shape.head_dim)
            loaded = [widen(shape, vec.load(values, place + at, lanes)) for at, lanes in chunk]
            for query, query_sums in zip(queries, sums, strict=True):
                weight = vec.load(memory, position + query.index * scratch.stride, 1)
                for (_, lanes), value, total in zip(chunk, loaded, query_sums, strict=True):
                    total[0] = vec.fma(vec.splat(weight, lanes), value, total[0])

        rounds = T.bind((end - begin) // _UNROLL)
        with T.serial(0, rounds) as i:
            for u in range(_UNROLL):
                add_position(T.bind(begin + i * _UNROLL + u))
        with T.serial(T.bind(begin + rounds * _UNROLL), end) as position:
            add_position(position)
        for query, query_sums in zip(queries, sums, strict=True):
            inverse = vec.load(memory, query.maximum_at, 1)
            for (at, lanes), total in zip(chunk, query_sums, strict=True):
                scaled = T.bind(total[0] * vec.splat(inverse, lanes))
                vec.store(buffers["o"], query.output_at + features.first + at, scaled, lanes)
