"""Norms, rotates and projects queries and keys and appends keys and values to the cache."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.attention.cache import store_key, store_value
from slmtvm.schedules.attention.rotate import Rotation, rotate_head
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.head_linear import project_heads
from slmtvm.schedules.kernel import Kernel, Work, define
from slmtvm.schedules.rows.statistics import inverse_rms
from slmtvm.schedules.vector import Buffer, Expr


def build_append(shape: AttentionShape) -> Kernel:
    """(projections, [cos, sin], [gammas], [bases], the cache) -> q float32 (m, q heads).

    The cache is the kernel's state, or, for "bidirectional" and where it is stateless, its outputs
    (after q; rows from m on are not written). One block for each row of each kv head.
    """
    cache_names = [t.name for t in shape.cache]
    if shape.cached:
        tensors = (*shape.inputs, *shape.cache, shape.q)
        outputs, state, scalars = ["q"], cache_names, ["position"]
    else:
        tensors = (*shape.inputs, shape.q, *shape.cache)
        outputs, state, scalars = ["q", *cache_names], [], []

    def body(block: Expr, *arguments: Any) -> None:
        buffers = {t.name: a for t, a in zip(tensors, arguments, strict=False)}
        position = arguments[len(tensors)] if shape.cached else T.int32(0)
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
    turn_queries(shape, buffers, head, row, position, queries, queries_at)
    append_key_value(shape, buffers, head, row, position)


def turn_queries(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    row: Expr,
    position: Expr,
    queries: Buffer,
    queries_at: Expr,
) -> None:
    """The queries of one kv head's group of one row, normed, rotated and projected."""
    (q_rows, q_at), _, _ = _projections(shape, buffers, head, row)
    with T.serial(0, shape.group) as member:
        source, at = _normed(shape, buffers, "q", q_rows, T.bind(q_at + member * shape.given_dim))
        target_at = T.bind(queries_at + member * shape.head_dim)
        if not shape.whole:
            _turn(shape, buffers, position, source, at, queries, target_at)
        else:
            turned = T.alloc_buffer((shape.whole,), "float32", scope="local")
            _turn(shape, buffers, position, source, at, turned, T.int32(0))
            _project(shape, buffers, "q", head, turned, T.int32(0), queries, target_at)


def append_key_value(
    shape: AttentionShape, buffers: dict[str, Buffer], head: Expr, row: Expr, position: Expr
) -> None:
    """Put the key and value of one kv head of one row into the cache."""
    _, (k_rows, k_at), (v_rows, v_at) = _projections(shape, buffers, head, row)
    turned = T.alloc_buffer((shape.given_dim,), "float32", scope="local")
    source, at = _normed(shape, buffers, "k", k_rows, k_at)
    _turn(shape, buffers, position, source, at, turned, T.int32(0))
    if shape.whole:
        key, value = (T.alloc_buffer((shape.head_dim,), "float32", scope="local") for _ in range(2))
        _project(shape, buffers, "k", head, turned, T.int32(0), key, T.int32(0))
        _project(shape, buffers, "v", head, v_rows, v_at, value, T.int32(0))
        turned, v_rows, v_at = key, value, T.int32(0)
    store_key(shape, buffers, head, position, turned, T.int32(0))
    store_value(shape, buffers, head, position, v_rows, v_at)


def _projections(
    shape: AttentionShape, buffers: dict[str, Buffer], head: Expr, row: Expr
) -> list[tuple[Buffer, Expr]]:
    """Where the queries of a kv head's group, its key and its value begin."""
    heads = {"q": shape.num_heads, "k": shape.num_kv_heads, "v": shape.num_kv_heads}
    found, before = [], 0
    for kind, count in heads.items():
        first = head * shape.group if kind == "q" else head
        if shape.separate:
            found.append((buffers[f"{kind}_in"], T.bind((row * count + first) * shape.given_dim)))
        else:
            place = row * sum(heads.values()) + before + first
            found.append((buffers["qkv"], T.bind(place * shape.given_dim)))
        before += count
    return found


def _normed(
    shape: AttentionShape, buffers: dict[str, Buffer], kind: str, source: Buffer, at: Expr
) -> tuple[Buffer, Expr]:
    """The head at ``at`` of ``source``, normed if the layer norms heads of its ``kind``."""
    eps, d = {"q": shape.q_eps, "k": shape.k_eps}[kind], shape.given_dim
    if eps is None:
        return source, at
    gamma = buffers[f"{kind}_gamma"]
    result = T.alloc_buffer((d,), "float32", scope="local")
    inverse = vec.splat(inverse_rms(d, lambda i, n: vec.load_part(source, at + i, n), eps))
    for i, lanes in vec.pieces(d):
        scaled = T.bind(vec.load(source, at + i, lanes) * vec.take_lanes(inverse, 0, lanes))
        vec.store(result, T.int32(i), scaled * vec.load(gamma, T.int32(i), lanes), lanes)
    return result, T.int32(0)


def _project(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    kind: str,
    head: Expr,
    source: Buffer,
    source_at: Expr,
    target: Buffer,
    target_at: Expr,
) -> None:
    """A head times the matrix of its ``kind`` and kv head."""
    size = (shape.whole, shape.head_dim)
    basis_at = T.bind(head * (shape.whole * shape.head_dim))
    project_heads(buffers[f"{kind}_basis"], basis_at, size, source, source_at, target, target_at)


def _turn(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    position: Expr,
    source: Buffer,
    source_at: Expr,
    target: Buffer,
    target_at: Expr,
) -> None:
    rotation = Rotation(shape.given_dim, shape.rotary_dim, shape.interleaved)
    rotate_head(
        rotation, buffers.get("cos"), buffers.get("sin"), position, source, source_at, target,
        target_at,
    )  # fmt: skip
