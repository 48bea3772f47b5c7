"""What the attention kernels mean, in numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slmtvm.schedules import vector as vec
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


def quantize(x: Array) -> tuple[Array, Array]:
    """Each last axis of x as int8 and its scale, amax / 127."""
    amax = np.abs(x).max(axis=-1).astype(np.float32)
    tiny = amax < np.float32(1e-30)
    inverse = np.where(tiny, np.float32(0), np.float32(127) / np.where(tiny, 1, amax))
    # The product of two float32 is exact in float64: it is rounded only once, as by an fma.
    levels = np.rint(x.astype(np.float64) * inverse[..., None].astype(np.float64))
    return levels.astype(np.int8), np.where(tiny, np.float32(0), amax / np.float32(127))


def quantize_nibbles(x: Array) -> tuple[Array, Array]:
    """Each last axis of x as levels -8 to 7 and its scale: -8 of them are the element with the
    largest magnitude, the lowest where there are two."""
    amax = np.abs(x).max(axis=-1).astype(np.float32)
    tiny = amax < np.float32(1e-30)
    most = np.where(x.max(axis=-1) + x.min(axis=-1) > 0, np.float32(-8), np.float32(8))
    inverse = np.where(tiny, np.float32(0), most / np.where(tiny, np.float32(1), amax))
    levels = np.rint(x.astype(np.float64) * inverse[..., None].astype(np.float64))
    return np.clip(levels, -8, 7).astype(np.int8), np.where(tiny, np.float32(0), amax / most)


def pack_key(shape: AttentionShape, levels: Array) -> Array:
    """int4 levels (..., head_dim), from -8 to 7, as the bytes of a key."""
    both = (levels.astype(np.int32) + 8).reshape(*levels.shape[:-1], -1, 2)
    return (both[..., 0] | both[..., 1] << 4).astype(np.uint8)


def pack_value(shape: AttentionShape, levels: Array) -> Array:
    """The same as the bytes of a value: each piece of a group in halves."""
    order = _halves(shape)
    return pack_key(shape, levels[..., order.T.reshape(-1)])


def unpack_key(shape: AttentionShape, stored: Array) -> Array:
    """The levels of ``pack_key``."""
    both = np.stack([stored & 15, stored >> 4], axis=-1).astype(np.int32) - 8
    return both.reshape(*stored.shape[:-1], -1)


def unpack_value(shape: AttentionShape, stored: Array) -> Array:
    """The levels of ``pack_value``."""
    levels = np.empty((*stored.shape[:-1], shape.head_dim), np.int32)
    levels[..., _halves(shape).T.reshape(-1)] = unpack_key(shape, stored)
    return levels


def _halves(shape: AttentionShape) -> Array:
    """The features that share each byte of a value, (2, head_dim / 2)."""
    pairs, size = [], shape.scale_group
    for first in range(0, shape.head_dim, size):
        for at, lanes in vec.pieces(size):
            begin = first + at + np.arange(lanes // 2)
            pairs.append(np.stack([begin, begin + lanes // 2]))
    return np.concatenate(pairs, axis=1)


def rounded(x: Array, scale: float, low: int, high: int) -> Array:
    """x rounded to multiples of ``scale``, from ``low`` to ``high`` of them."""
    step = float(np.float32(scale))
    return np.rint(np.clip(x / step, low, high)) * step


def stored(shape: AttentionShape, x: Array) -> Array:
    """x as a cache of floats holds it: rounded once; float16 has no infinities."""
    largest = np.finfo(shape.kv_dtype).max
    return np.clip(x, -largest, largest).astype(shape.kv_dtype)


def append(shape: AttentionShape, inputs: Mapping[str, Array], position: int) -> dict[str, Array]:
    """Outputs q and the cache of the append kernel, computed in float64."""
    m, h, kv, d = shape.m, shape.num_heads, shape.num_kv_heads, shape.head_dim
    given = [inputs[t.name].astype(np.float64) for t in shape.projections]
    heads = np.concatenate(given, axis=1).reshape(m, h + 2 * kv, shape.given_dim)
    q, k, v = heads[:, :h], heads[:, h : h + kv], heads[:, h + kv :]
    if shape.q_eps is not None:
        q = norm(q, inputs["q_gamma"], shape.q_eps)
    if shape.k_eps is not None:
        k = norm(k, inputs["k_gamma"], shape.k_eps)
    if shape.rotary_dim:
        here = slice(position, position + m)
        cos, sin = (inputs[name][here].astype(np.float64) for name in ("cos", "sin"))
        q, k = rotate(shape, q, cos, sin), rotate(shape, k, cos, sin)
    if shape.whole:
        q_basis, k_basis, v_basis = (inputs[t.name].astype(np.float64) for t in shape.bases)
        q = np.einsum("mhd,hdr->mhr", q, np.repeat(q_basis, shape.group, axis=0))
        k, v = np.einsum("mhd,hdr->mhr", k, k_basis), np.einsum("mhd,hdr->mhr", v, v_basis)
    made = {t.name: inputs[t.name].copy() for t in shape.cache}
    for i in range(m):
        block, lane = divmod(position + i, LANES)
        if shape.kv_dtype == "int4":
            grouped = (shape.num_kv_heads, shape.scale_groups, shape.scale_group)
            key, k_scale = quantize_nibbles(k[i].astype(np.float32).reshape(grouped))
            value, v_scale = quantize_nibbles(v[i].astype(np.float32).reshape(grouped))
            made["k_scale"][:, :, position + i] = k_scale
            made["v_scale"][:, position + i] = v_scale
            key = pack_key(shape, key.reshape(shape.num_kv_heads, d))
            value = pack_value(shape, value.reshape(shape.num_kv_heads, d))
        elif shape.kv_dtype == "int8":
            key, made["k_scale"][:, position + i] = quantize(k[i].astype(np.float32))
            value, made["v_scale"][:, position + i] = quantize(v[i].astype(np.float32))
        else:
            key, value = stored(shape, k[i]), stored(shape, v[i])
        made["k_cache"][:, block, :, lane] = key
        made["v_cache"][:, position + i] = value
    return {"q": q.reshape(m, h * d).astype(np.float32), **made}


def attend(shape: AttentionShape, inputs: Mapping[str, Array], scalar: int) -> Array:
    """Output o of the attend kernel, float64; ``scalar`` is position, or valid."""
    m, h, d = shape.m, shape.num_heads, shape.head_dim
    q = inputs["q"].astype(np.float64).reshape(m, h, d)
    keys = inputs["k_cache"].transpose(0, 1, 3, 2)
    keys = keys.reshape(shape.num_kv_heads, shape.capacity, -1)
    values = inputs["v_cache"]
    if shape.kv_dtype == "int4":
        keys, values = unpack_key(shape, keys), unpack_value(shape, values)
    keys, values = keys.astype(np.float64), values.astype(np.float64)
    if shape.kv_dtype == "int8":
        keys = keys * inputs["k_scale"].astype(np.float64)[:, :, None]
        values = values * inputs["v_scale"].astype(np.float64)[:, :, None]
    elif shape.kv_dtype == "int4":
        size = shape.scale_group
        scales = inputs["k_scale"].astype(np.float64).transpose(0, 2, 1)
        keys = keys * np.repeat(scales, size, axis=2)
        values = values * np.repeat(inputs["v_scale"].astype(np.float64), size, axis=2)
    o = np.empty((m, h, d))
    for i in range(m):
        position = scalar + i if shape.causal else i
        end = position + 1 if shape.causal else scalar
        begin = max(0, position + 1 - shape.window) if shape.window else 0
        if shape.chunk:
            begin = min(position, end - 1) // shape.chunk * shape.chunk
            end = min(end, begin + shape.chunk)
        for head in range(h):
            kv = head // shape.group
            scores = keys[kv, begin:end] @ q[i, head]
            for factor, step, low, high in shape.roundings:
                scores = rounded(scores * factor, step, low, high)
            scores = scores * shape.scale
            if shape.softcap:
                scores = shape.softcap * np.tanh(scores / shape.softcap)
            if shape.bias_columns:
                first = begin if shape.bias_by_key else shape.bias_zero - position + begin
                scores = scores + inputs["bias"][head, first : first + end - begin]
            for factor, step, low, high in shape.sum_roundings:
                scores = rounded(scores * factor, step, low, high)
            if shape.mask_positions:
                scores = np.minimum(scores, inputs["limits"][begin:end])
            sink = inputs["sinks"][head : head + 1] if shape.has_sinks else scores[:0]
            largest = np.concatenate([scores, sink]).max()
            weights = np.exp(scores - largest)
            weights /= weights.sum() + np.exp(sink - largest).sum()
            for factor, step, low, high in shape.weight_roundings:
                weights = rounded(weights * factor, step, low, high)
            o[i, head] = weights @ values[kv, begin:end]
    return o.reshape(m, h * d)
