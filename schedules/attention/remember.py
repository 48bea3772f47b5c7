"""Keeps the keys and values of an encoder-decoder's source for its cross-attention."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.attention.cache import store_key, store_value
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.vector import Expr


def build_remember(shape: AttentionShape) -> Kernel:
    """(kv float32 (m, 2 * num_kv_heads * head_dim), the cache): row i goes to position i.

    A row of kv is [k heads | v heads]; ``shape`` is the cross-attention's, "bidirectional". One
    block for each row of each kv head.
    """
    d, heads = shape.head_dim, shape.num_kv_heads
    kv = Tensor("kv", (shape.m, 2 * heads * d), "float32")
    tensors = (kv, *shape.cache)

    def body(block: Expr, *arguments: Any) -> None:
        buffers = {t.name: a for t, a in zip(tensors, arguments, strict=False)}
        head, row = T.bind(block // shape.m), T.bind(block % shape.m)
        k_at = T.bind(row * (2 * heads * d) + head * d)
        store_key(shape, buffers, head, row, buffers["kv"], k_at)
        store_value(shape, buffers, head, row, buffers["kv"], T.bind(k_at + heads * d))

    return define(
        shape.name("remember"), tensors, body, grid=heads * shape.m,
        outputs=[], state=[t.name for t in shape.cache], scalars=[],
    )  # fmt: skip
