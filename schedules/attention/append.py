"""Rotates queries and keys by their position and appends keys and values to the cache."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.attention.cache import narrow
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.kernel import Kernel, Work, define
from slmtvm.schedules.vector import LANES, Buffer, Expr


def build_append(shape: AttentionShape) -> Kernel:
    """(qkv, [cos, sin], k_cache, v_cache) -> q float32 (m, num_heads * head_dim).

    The cache is the kernel's state, or, for "bidirectional", its outputs (after q; rows from m on
    are not written). One block for each row of each kv head.
    """
    inputs = (shape.qkv, *shape.tables)
    cache_names = [t.name for t in shape.cache]
    if shape.causal:
        tensors = (*inputs, *shape.cache, shape.q)
        outputs, state, scalars = ["q"], cache_names, ["position"]
    else:
        tensors = (*inputs, shape.q, *shape.cache)
        outputs, state, scalars = ["q", *cache_names], [], []

    def body(block: Expr, *arguments: Any) -> None:
        buffers = {t.name: a for t, a in zip(tensors, arguments, strict=False)}
        position = arguments[len(tensors)] if shape.causal else T.int32(0)
        head, row = T.bind(block // shape.m), T.bind(block % shape.m)
        features, d = shape.num_heads * shape.head_dim, shape.head_dim
        append_row(
            shape, buffers, head, row, T.bind(position + row), buffers["q"],
            T.bind(row * features + head * (shape.group * d)),
        )  # fmt: skip

    return define(
        shape.name("append"), tensors, body, grid=shape.num_kv_heads * shape.m,
        outputs=outputs, state=state, scalars=scalars, work=Work(touched=shape.table_bytes),
    )  # fmt: skip


def append_row(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    row: Expr,
    position: Expr,
    queries: Buffer,
    queries_at: Expr,
) -> None:
    """Append the key and value of one kv head of one row; its group's queries go to ``queries``."""
    d, group = shape.head_dim, shape.group
    qkv, width = buffers["qkv"], shape.qkv.shape[1]
    q_at = T.bind(row * width + head * (group * d))
    k_at = T.bind(row * width + (shape.num_heads + head) * d)
    v_at = T.bind(row * width + (shape.num_heads + shape.num_kv_heads + head) * d)
    with T.serial(0, group) as member:
        rotate_head(
            shape, buffers, position, qkv, q_at + member * d, queries, queries_at + member * d
        )
    rotated = T.alloc_buffer((d,), "float32", scope="local")
    rotate_head(shape, buffers, position, qkv, k_at, rotated, T.int32(0))
    key = _stored_key(shape, rotated)
    blocks = shape.capacity // LANES
    start = T.bind((head * blocks + position // LANES) * (d * LANES) + position % LANES)
    with T.serial(0, d) as i:
        vec.store(buffers["k_cache"], start + i * LANES, vec.load(key, i, 1), 1)
    v_out = T.bind((head * shape.capacity + position) * d)
    for at, lanes in vec.pieces(d):
        value = narrow(shape, vec.load(qkv, v_at + at, lanes))
        vec.store(buffers["v_cache"], v_out + at, value, lanes)


def _stored_key(shape: AttentionShape, rotated: Buffer) -> Buffer:
    """The key as the cache stores it: converted by vectors, since its elements go far apart."""
    if shape.kv_dtype == "float32":
        return rotated
    key = T.alloc_buffer((shape.head_dim,), shape.kv_dtype, scope="local")
    for at, lanes in vec.pieces(shape.head_dim):
        value = narrow(shape, vec.load(rotated, T.int32(at), lanes))
        vec.store(key, T.int32(at), value, lanes)
    return key


def rotate_head(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    position: Expr,
    source: Buffer,
    source_at: Expr,
    target: Buffer,
    target_at: Expr,
) -> None:
    """One head of head_dim features from source to target, its first rotary_dim rotated."""
    half = shape.rotary_dim // 2
    for at, lanes in vec.pieces(half):
        cos = vec.load(buffers["cos"], position * half + at, lanes)
        sin = vec.load(buffers["sin"], position * half + at, lanes)
        if shape.interleaved:
            both = vec.load(source, source_at + 2 * at, 2 * lanes)
            a = vec.shuffle([both], range(0, 2 * lanes, 2))
            b = vec.shuffle([both], range(1, 2 * lanes, 2))
        else:
            a = vec.load(source, source_at + at, lanes)
            b = vec.load(source, source_at + half + at, lanes)
        turned_a = vec.fma(a, cos, T.bind(-T.bind(b * sin)))
        turned_b = vec.fma(b, cos, T.bind(a * sin))
        if shape.interleaved:
            order = [i // 2 + (i % 2) * lanes for i in range(2 * lanes)]
            pairs = vec.shuffle([turned_a, turned_b], order)
            vec.store(target, target_at + 2 * at, pairs, 2 * lanes)
        else:
            vec.store(target, target_at + at, turned_a, lanes)
            vec.store(target, target_at + half + at, turned_b, lanes)
    for at, lanes in vec.pieces(shape.head_dim - shape.rotary_dim):
        rest = shape.rotary_dim + at
        vec.store(target, target_at + rest, vec.load(source, source_at + rest, lanes), lanes)
