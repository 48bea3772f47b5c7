"""Embeddings, linear layers, convolutions and norms."""

from __future__ import annotations

import numpy as np

from slmtvm.ir.reference.arrays import Array, Attrs
from slmtvm.ir.reference.rounding import quantize_blocks, quantize_rows
from slmtvm.ir.reference.weights import dequantize


def embedding(tokens: Array, attrs: Attrs, _kind: str, table: Array, **quantized: Array) -> Array:
    dim, format, group_size = int(attrs["dim"]), str(attrs["format"]), int(attrs["group_size"])
    block = int(attrs["group_channels"])
    places = tokens // (block or 1)
    rows = {k: v if v.shape == (1,) else v[places] for k, v in quantized.items()}
    return dequantize(
        table[tokens], rows.get("scales"), rows.get("zero_points"),
        format=format, group_size=group_size, columns=dim, group_channels=min(block, 1),
    )  # fmt: skip


def earlier(attrs: Attrs, tokens: Array) -> Array:
    first = int(attrs["first"])
    return np.concatenate([tokens[-1:] if first < 0 else [np.int32(first)], tokens[:-1]])


def linear(x: Array, attrs: Attrs, kind: str, weight: Array, **named: Array) -> Array:
    group_size, activation = int(attrs["group_size"]), str(attrs["activation"])
    w = dequantize(
        weight, named.get("scales"), named.get("zero_points"),
        format=str(attrs["format"]), group_size=group_size, columns=int(attrs["k"]),
        group_channels=int(attrs.get("group_channels", 0)),
    )  # fmt: skip
    if activation == "block":
        x = quantize_blocks(x, group_size)
    elif activation == "row_u8":
        # An encoder's only step is the whole sequence: one range, as in the file.
        x = quantize_rows(x.reshape(1, -1)) if kind == "encoder" else quantize_rows(x)
        x = x.reshape(-1, int(attrs["k"]))
    y = x @ w.T
    return np.asarray(y + named["bias"] if "bias" in named else y)


def head_linear(
    x: Array, attrs: Attrs, _kind: str, weight: Array, bias: Array | None = None
) -> Array:
    heads = int(attrs["num_heads"])
    matrices = np.repeat(weight, heads // len(weight), axis=0)
    parts = x.reshape(len(x), heads, -1).transpose(1, 0, 2) @ matrices
    y = parts.transpose(1, 0, 2).reshape(len(x), -1)
    return np.asarray(y if bias is None else y + bias)


def causal_conv(
    x: Array, _attrs: Attrs, _kind: str, weight: Array, bias: Array | None = None
) -> Array:
    taps = len(weight)
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1]), x.dtype), x])
    y = sum(weight[j] * padded[j : j + len(x)] for j in range(taps))
    return np.asarray(y if bias is None else y + bias)


def rms_norm(attrs: Attrs, x: Array, gamma: Array) -> Array:
    parts = x.reshape(len(x), int(attrs["groups"]), -1)
    square = np.mean(parts * parts, axis=2, keepdims=True)
    return np.asarray(parts / np.sqrt(square + np.float32(attrs["eps"])) * gamma).reshape(x.shape)


def layer_norm(attrs: Attrs, x: Array, gamma: Array, beta: Array) -> Array:
    parts = x.reshape(len(x), int(attrs["groups"]), -1)
    centred = (parts - parts.mean(axis=2, keepdims=True)).reshape(x.shape)
    return np.asarray(rms_norm(attrs, centred, gamma).reshape(parts.shape) + beta).reshape(x.shape)


def pool(attrs: Attrs, x: Array, *, visible: Array | None = None) -> Array:
    how = str(attrs["how"])
    if how == "first":
        return x[:1]
    if how == "weightedmean":
        weights = np.arange(1, len(x) + 1, dtype=x.dtype)[:, None]
        weights = weights if visible is None else weights * visible[:, None]
        return np.asarray((x * weights).sum(axis=0) / weights.sum())[None]
    seen = x if visible is None or how == "last" else x[visible]
    if how == "last":
        return seen[-1:]
    return np.asarray(seen.mean(axis=0) if how == "mean" else seen.max(axis=0))[None]
