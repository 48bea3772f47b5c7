"""Decoding with a single kv head, or on many cores: the positions of a kv head, then its features,
are divided among blocks.

Both kernels do to a score or a feature what build_decode's does, in the same order: their results
are equal in every bit.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.attention.append import append_key_value, turn_queries
from slmtvm.schedules.attention.attend import group_queries, visible_span
from slmtvm.schedules.attention.queries import Scratch
from slmtvm.schedules.attention.scores import Span, compute_scores, softmax
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.attention.tile import tile_queries
from slmtvm.schedules.attention.values import Features, weigh_values
from slmtvm.schedules.kernel import Kernel, Tensor, Work, define
from slmtvm.schedules.vector import LANES, Expr

_CORES = 4  # of the usual small device
_MOST = 16


def parts_of(shape: AttentionShape) -> int:
    """How many parts of a kv head's work are worth a kernel more; 1: it should not be divided.

    Every part of the features computes the softmax again, so only an only kv head is divided: that
    costs one thread 2% of a token at most and gives two threads a half more at long contexts, while
    with two kv heads two threads lose. Where the shape is ``divided``, all are, in more parts.
    """
    if shape.blocks is not None or (shape.num_kv_heads > 1 and not shape.divided):
        return 1
    most = _MOST if shape.divided else _CORES
    return max(n for n in range(1, most + 1) if n == 1 or shape.head_dim % (n * LANES) == 0)


def _memory(shape: AttentionShape) -> Scratch:
    """Where the scores of all heads lie, and the maxima of their parts."""
    return Scratch(shape.num_heads, shape.kept, parts=parts_of(shape))


def _scores_tensor(shape: AttentionShape) -> Tensor:
    return Tensor("scores", (_memory(shape).size,), "float32")


def build_divided_scores(shape: AttentionShape) -> Kernel:
    """What build_append takes, [bias], [sinks], [limits], [numbers] and the cache -> scores.

    For one token. Scores are float32. The cache is appended to. One block for each part of the
    positions of each kv head.
    """
    assert shape.m == 1 and shape.cached, shape
    parts, memory = parts_of(shape), _memory(shape)
    own = Tensor("scratch", (shape.group * shape.head_dim,), "float32")
    tensors = (
        *shape.inputs,
        *shape.bias,
        *shape.sinks,
        *shape.limits,
        *shape.constants,
        *shape.cache,
        _scores_tensor(shape),
        own,
    )

    def body(block: Expr, *arguments: Any) -> None:
        buffers = {t.name: a for t, a in zip(tensors, arguments, strict=False)}
        position, zero = arguments[-1], T.int32(0)
        head, part = T.bind(block // parts), T.bind(block % parts)
        turn_queries(shape, buffers, head, zero, position, buffers["scratch"], zero)
        # The last part is the one that reads the new key.
        with T.If(part == parts - 1), T.Then():
            append_key_value(shape, buffers, head, zero, position)
        maxima = T.bind(memory.maxima + (head * parts + part - head) * shape.group)
        index = T.bind(head * shape.group)
        queries = group_queries(shape, head, position, position, zero, zero, index, maxima)
        whole = visible_span(shape, queries)
        count = T.bind(whole.end - whole.begin)
        begin, end = (T.bind(whole.begin + count * p // parts) for p in (part, part + 1))
        size = tile_queries(shape)
        for at in range(0, len(queries), size):
            compute_scores(
                shape, buffers, head, queries[at : at + size], buffers["scratch"],
                buffers["scores"], memory, Span(shape, begin, end),
            )  # fmt: skip

    return define(
        shape.name("scores"), tensors, body, grid=shape.num_kv_heads * parts,
        outputs=["scores"], state=[t.name for t in shape.cache], scalars=["position"],
        work=_half(shape, "v"), runs=shape.num_kv_heads,
    )  # fmt: skip


def build_divided_values(shape: AttentionShape) -> Kernel:
    """(scores, [sinks], [numbers], values of the cache) -> o, after build_divided_scores's kernel.

    One block for each part of the features of each kv head.
    """
    parts, memory = parts_of(shape), _memory(shape)
    own = Scratch(shape.group, shape.kept)
    values = [t for t in shape.cache if t.name.startswith("v_")]
    tensors = (_scores_tensor(shape), *shape.sinks, *shape.constants, *values, shape.o, own.tensor)
    width = shape.head_dim // parts

    def body(block: Expr, *arguments: Any) -> None:
        buffers = {t.name: a for t, a in zip(tensors, arguments, strict=False)}
        position, scores = arguments[-1], buffers["scores"]
        head, part = T.bind(block // parts), T.bind(block % parts)
        output_at = T.bind(head * (shape.group * shape.head_dim))
        queries = group_queries(
            shape, head, position, position, T.int32(0), output_at, T.int32(0), own.maxima
        )
        span = visible_span(shape, queries)
        with T.serial(0, shape.group) as i:
            maxima = T.bind(memory.maxima + head * parts * shape.group + i)
            largest = vec.load(scores, maxima, 1)
            for p in range(1, parts):
                largest = T.bind(
                    vec.maximum(vec.load(scores, maxima + p * shape.group, 1), largest)
                )
            row = T.bind((head * shape.group + i) * memory.stride)
            weights_at = T.bind(i * own.stride)
            inverse = softmax(shape, buffers, head, i, scores, row, largest, weights_at, span)
            vec.store(buffers["scratch"], i + own.maxima, inverse, 1)
        features, size = Features(T.bind(part * width), width), tile_queries(shape)
        for at in range(0, len(queries), size):
            weigh_values(shape, buffers, head, queries[at : at + size], own, features, span)

    return define(
        shape.name("values"), tensors, body, grid=shape.num_kv_heads * parts,
        outputs=["o"], scalars=["position"], work=_half(shape, "k"),
        runs=shape.num_kv_heads,
    )  # fmt: skip


def _half(shape: AttentionShape, unread: str) -> Work:
    """Half of the layer's work, where the cache's ``unread`` half, "k" or "v", is not read."""
    touched = {t.name: 0 for t in shape.cache if t.name.startswith(unread)}
    tables = shape.table_bytes if unread == "v" else {}
    return Work(
        context_multiply_adds=shape.work.context_multiply_adds // 2,
        window=shape.work.window,
        positions=shape.work.positions,
        touched={**tables, **touched},
    )  # fmt: skip
