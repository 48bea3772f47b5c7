"""Keeps the keys and values of an encoder-decoder's source for its cross-attention."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.attention.cache import narrow
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.vector import LANES, Expr


def build_remember(shape: AttentionShape) -> Kernel:
    """(kv float32 (m, 2 * num_kv_heads * head_dim), k_cache, v_cache): row i goes to position i.

    A row of kv is [k heads | v heads]; ``shape`` is the cross-attention's, "bidirectional". One
    block for each row of each kv head.
    """
    d, heads = shape.head_dim, shape.num_kv_heads
    kv = Tensor("kv", (shape.m, 2 * heads * d), "float32")
    tensors = (kv, *shape.cache)

    def body(block: Expr, *arguments: Any) -> None:
        rows, keys, values = arguments[:3]
        head, row = T.bind(block // shape.m), T.bind(block % shape.m)
        k_at = T.bind(row * (2 * heads * d) + head * d)
        v_at = T.bind(k_at + heads * d)
        key = T.alloc_buffer((d,), shape.kv_dtype, scope="local")
        v_out = T.bind((head * shape.capacity + row) * d)
        for at, lanes in vec.pieces(d):
            vec.store(key, T.int32(at), narrow(shape, vec.load(rows, k_at + at, lanes)), lanes)
            vec.store(values, v_out + at, narrow(shape, vec.load(rows, v_at + at, lanes)), lanes)
        start = T.bind(
            (head * (shape.capacity // LANES) + row // LANES) * (d * LANES) + row % LANES
        )
        with T.serial(0, d) as i:
            vec.store(keys, start + i * LANES, vec.load(key, i, 1), 1)

    return define(
        shape.name("remember"), tensors, body, grid=heads * shape.m,
        outputs=[], state=[t.name for t in shape.cache], scalars=[],
    )  # fmt: skip
