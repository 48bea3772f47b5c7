"""What the attention kernels mean, in numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.vector import LANES

Array = np.ndarray


def rotate(shape: AttentionShape, x: Array, cos: Array, sin: Array) -> Array:
    """x float64 (m, heads, head_dim) rotated by rows of the tables, float64 (m, rotary_dim / 2)."""
    half = shape.rotary_dim // 2
    result = x.copy()
    if shape.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b, c, s = x[..., first], x[..., second], cos[:, None], sin[:, None]
    result[..., first] = a * c - b * s
    result[..., second] = b * c + a * s
    return result


def norm(x: Array, gamma: Array, eps: float) -> Array:
    """The RMS norm of each head of x float64 (m, heads, head_dim)."""
    return x / np.sqrt((x * x).mean(axis=2, keepdims=True) + eps) * gamma


def stored(shape: AttentionShape, x: Array) -> Array:
    """x as the cache holds it: rounded once; float16 has no infinities."""
    largest = np.finfo(shape.kv_dtype).max
    return np.clip(x, -largest, largest).astype(shape.kv_dtype)


def append(shape: AttentionShape, inputs: Mapping[str, Array], position: int) -> dict[str, Array]:
    """Outputs q, k_cache and v_cache of the append kernel, computed in float64."""
    m, h, kv, d = shape.m, shape.num_heads, shape.num_kv_heads, shape.head_dim
    given = [inputs[t.name].astype(np.float64) for t in shape.projections]
    heads = np.concatenate(given, axis=1).reshape(m, h + 2 * kv, d)
    q, k, v = heads[:, :h], heads[:, h : h + kv], heads[:, h + kv :]
    if shape.q_eps is not None:
        q = norm(q, inputs["q_gamma"], shape.q_eps)
    if shape.k_eps is not None:
        k = norm(k, inputs["k_gamma"], shape.k_eps)
    if shape.rotary_dim:
        here = slice(position, position + m)
        cos, sin = (inputs[name][here].astype(np.float64) for name in ("cos", "sin"))
        q, k = rotate(shape, q, cos, sin), rotate(shape, k, cos, sin)
    k_cache, v_cache = inputs["k_cache"].copy(), inputs["v_cache"].copy()
    for i in range(m):
        block, lane = divmod(position + i, LANES)
        k_cache[:, block, :, lane] = stored(shape, k[i])
        v_cache[:, position + i] = stored(shape, v[i])
    return {
        "q": q.reshape(m, h * d).astype(np.float32),
        "k_cache": k_cache,
        "v_cache": v_cache,
    }


def attend(shape: AttentionShape, inputs: Mapping[str, Array], scalar: int) -> Array:
    """Output o of the attend kernel, float64; ``scalar`` is position, or valid."""
    m, h, d = shape.m, shape.num_heads, shape.head_dim
    q = inputs["q"].astype(np.float64).reshape(m, h, d)
    keys = inputs["k_cache"].astype(np.float64).transpose(0, 1, 3, 2)
    keys = keys.reshape(shape.num_kv_heads, shape.capacity, d)
    values = inputs["v_cache"].astype(np.float64)
    o = np.empty((m, h, d))
    for i in range(m):
        position = scalar + i if shape.causal else i
        end = position + 1 if shape.causal else scalar
        begin = max(0, position + 1 - shape.window) if shape.window else 0
        for head in range(h):
            kv = head // shape.group
            scores = keys[kv, begin:end] @ q[i, head] * shape.scale
            if shape.softcap:
                scores = shape.softcap * np.tanh(scores / shape.softcap)
            if shape.bias_columns:
                first = shape.bias_zero - position + begin
                scores = scores + inputs["bias"][head, first : first + end - begin]
            weights = np.exp(scores - scores.max())
            o[i, head] = weights @ values[kv, begin:end] / weights.sum()
    return o.reshape(m, h * d)
