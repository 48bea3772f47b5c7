"""Attention and what tells it positions."""

from __future__ import annotations

import numpy as np

from slmtvm.ir import ops
from slmtvm.ir.reference.arrays import Array, Attrs
from slmtvm.ir.reference.rounding import rounded

HIDDEN = np.float32(-1e30)  # the score of a hidden key: finite, for rows that see no others


def position_rows(_attrs: Attrs, tokens: Array, table: Array) -> Array:
    return table[: len(tokens)]


def rope(attrs: Attrs, x: Array, cos: Array, sin: Array) -> Array:
    m, half = len(x), cos.shape[1]
    heads = x.reshape(m, int(attrs["num_heads"]), int(attrs["head_dim"]))
    if int(attrs["interleaved"]):
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    c, s = cos[:m, None, :], sin[:m, None, :]
    a, b = heads[..., first], heads[..., second]
    result = heads.copy()
    result[..., first], result[..., second] = a * c - b * s, b * c + a * s
    return result.reshape(m, -1)


def attention(
    attrs: Attrs,
    q: Array,
    k: Array,
    v: Array,
    *optional: Array,
    visible: Array | None = None,
) -> Array:
    """``ir.ops.attention``; keys that are not ``visible``, bool (m,), have no weight."""
    named = dict(zip(filter(None, str(attrs["operands"]).split(",")), optional, strict=True))
    bias, sinks, mask = (named.get(name) for name in ("bias", "sinks", "visible"))
    m, causal = len(q), str(attrs["mask"]) == "causal"
    softcap, window = float(attrs["softcap"]), int(attrs["window"])
    added = None
    if bias is not None and str(attrs["bias_by"]) == "key":
        added = bias[:, None, :m]
    elif bias is not None:
        context = bias.shape[1] if causal else (bias.shape[1] + 1) // 2
        behind = np.subtract.outer(np.arange(m), np.arange(m))
        # What is ahead has no column in a causal bias, and is hidden below.
        added = bias[:, context - 1 - np.maximum(behind, 0 if causal else -context)]
    seen = np.tri(m, dtype=bool) if causal else np.ones((m, m), bool)
    if window:
        seen &= ~np.tri(m, k=-window, dtype=bool)
    if chunk := int(attrs.get("chunk", 0)):
        block = np.arange(m) // chunk
        seen = seen & (block[:, None] == block)
    if mask is not None:
        seen = seen & (np.unpackbits(mask[:, :m], axis=-1)[:, :, :m] != 0)
    return attend(attrs, q, k, v, softcap, added, seen, visible=visible, sinks=sinks)


def attend(
    attrs: Attrs,
    q: Array,
    k: Array,
    v: Array,
    softcap: float = 0.0,
    added: Array | None = None,
    seen: Array | None = None,
    *,
    visible: Array | None = None,
    sinks: Array | None = None,
) -> Array:
    """Attention of q over the rows of k and v that are ``seen``, bool (m, n) or (heads, m, n).

    ``added``, (heads, m, n) or what is broadcast to it, is added to scores. Keys that are not
    ``visible``, bool (n,), have no weight where a row sees others. ``sinks``, (heads,): a score
    more that each head's softmax counts.
    """
    num_heads, head_dim = int(attrs["num_heads"]), int(attrs["head_dim"])
    num_kv_heads = int(attrs["num_kv_heads"])

    def split(x: Array, heads: int) -> Array:
        per_head = x.reshape(len(x), heads, head_dim).transpose(1, 0, 2)
        return np.repeat(per_head, num_heads // heads, axis=0)

    queries, keys, values = split(q, num_heads), split(k, num_kv_heads), split(v, num_kv_heads)
    scores = queries @ keys.transpose(0, 2, 1)
    for factor, scale, low, high in ops.parse_roundings(str(attrs.get("roundings", ""))):
        scores = rounded(scores * np.float32(factor), scale, low, high)
    scores = scores * np.float32(attrs["scale"])
    if softcap:
        scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
    if added is not None:
        scores = scores + added
    for factor, scale, low, high in ops.parse_roundings(str(attrs.get("sum_roundings", ""))):
        scores = rounded(scores * np.float32(factor), scale, low, high)
    if seen is not None:
        scores = np.where(seen, scores, np.float32(-np.inf))
    if visible is not None:
        scores = np.where(visible, scores, np.minimum(scores, HIDDEN))
    counted = scores
    if sinks is not None:
        more = np.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))
        counted = np.concatenate([scores, more], axis=2)
    largest = counted.max(axis=2, keepdims=True)
    weights = np.exp(scores - largest) / np.exp(counted - largest).sum(axis=2, keepdims=True)
    for factor, scale, low, high in ops.parse_roundings(str(attrs.get("weight_roundings", ""))):
        weights = rounded(weights * np.float32(factor), scale, low, high)
    return np.asarray((weights @ values).transpose(1, 0, 2).reshape(len(q), -1))
