"""What the row kernels mean, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from slmtvm.schedules.rows import pair, rescale
from slmtvm.schedules.rows.op import GLUS, STATIC, RowOp

Array = np.ndarray

_erf = np.vectorize(math.erf, otypes=[np.float64])


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "copy": lambda x: x,
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0.0),
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "tanh": np.tanh,
    "gelu_erf": lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    ),
}


def prologue(op: RowOp, inputs: Mapping[str, Array]) -> Array:
    """The prologue's result in float64 (m, d); a norm's input is the float32 sum."""
    x = inputs["x"]
    if op.residual:
        x = x + inputs["residual"]
    x = x.astype(np.float64)
    if op.prologue in _FUNCTIONS:
        return _FUNCTIONS[op.prologue](x)
    if op.prologue in GLUS:
        gate = _FUNCTIONS[op.prologue.removesuffix("_glu")]
        return np.asarray(gate(x[:, : op.d]) * x[:, op.d :])
    if op.pair is not None:
        return pair.reference(op.pair, inputs["x"], inputs["other"]).astype(np.float64)
    if op.prologue == "rescale":
        return rescale.reference(inputs["x"], inputs["steps"], op.unit).astype(np.float64)
    if op.prologue == "swiglu":
        alpha, beta, limit = inputs["constants"].astype(np.float64)
        g, up = np.minimum(x[:, : op.d], limit), np.clip(x[:, op.d :], -limit, limit)
        return np.asarray(g / (1.0 + np.exp(-alpha * g)) * (up + beta))
    gamma = inputs["gamma"].astype(np.float64)
    if op.prologue == "rms_norm":
        return np.asarray(x / np.sqrt((x**2).mean(1, keepdims=True) + op.eps) * gamma)
    centred = x - x.mean(1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(1, keepdims=True) + op.eps)
    return np.asarray(scaled * gamma + inputs["beta"])


def quantize_block(y: Array, group_size: int) -> dict[str, Array]:
    """The epilogue "block" of y float32 (m, d)."""
    m, d = y.shape
    k_padded = -(-d // group_size) * group_size
    padded = np.zeros((m, k_padded), np.float32)
    padded[:, :d] = y
    blocks = padded.reshape(m, -1, group_size)
    amax = np.abs(blocks).max(2)
    tiny = amax < np.float32(1e-30)
    divisor = np.where(tiny, np.float32(1), amax)
    inverse = np.where(tiny, np.float32(0), np.float32(127) / divisor)
    q = np.rint(blocks * inverse[:, :, None])
    return {
        "xq": q.astype(np.int8).reshape(m, k_padded),
        "xs": np.where(tiny, np.float32(0), amax / np.float32(127)),
        "xsum": q.sum(2).astype(np.float32),
    }


def row_ranges(y: Array) -> tuple[Array, Array]:
    """The least and the greatest of each row of y float32 (m, d), 0 among them."""
    return np.fmin(np.fmin.reduce(y, 1), np.float32(0)), np.fmax(
        np.fmax.reduce(y, 1), np.float32(0)
    )


def quantize_tensor_u8(y: Array, valid: int, k_padded: int, storage: str) -> dict[str, Array]:
    """DynamicQuantizeLinear of y float32 (m, d) with the range of its first ``valid`` rows."""
    low, high = row_ranges(y[:valid])
    whole = np.full(len(y), low.min()), np.full(len(y), high.max())
    return quantize_row_u8(y, k_padded, storage, whole)


def quantize_row_u8(
    y: Array, k_padded: int, storage: str, ranges: tuple[Array, Array] | None = None
) -> dict[str, Array]:
    """The epilogue "row_u8" of y float32 (m, d); each row's own range unless given."""
    d = y.shape[1]
    low, high = ranges or row_ranges(y)
    scale = np.where(high == low, np.float32(1), (high - low) / np.float32(255))
    zero_point = np.rint(np.clip((np.float32(0) - low) / scale, 0, 255)).astype(np.int32)
    q = np.tile(zero_point[:, None], (1, k_padded))
    ideal = np.nan_to_num(y / scale[:, None], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    least = -zero_point[:, None].astype(np.float32)
    q[:, :d] += np.rint(np.clip(ideal, least, least + 255)).astype(np.int32)
    stored = q.astype(np.uint8) if storage == "uint8" else (q - 128).astype(np.int8)
    return {"xq": stored, "xs": scale, "xz": zero_point}


def static_levels(op: RowOp, y: Array) -> Array:
    """``y / scale`` rounded, within low and high, int32; what is no number becomes low."""
    ideal = np.clip(np.nan_to_num(y / np.float32(op.scale), nan=-np.inf), op.low, op.high)
    return np.rint(ideal).astype(np.int32)


def quantize_static_u8(op: RowOp, y: Array) -> dict[str, Array]:
    """The epilogue "static_u8"."""
    q = np.full((op.m, op.k_padded), -op.low, np.int32)
    q[:, : op.d] += static_levels(op, y)
    stored = q.astype(np.uint8) if op.storage == "uint8" else (q - 128).astype(np.int8)
    scale, zero_point = np.full(op.m, op.scale, np.float32), np.full(op.m, -op.low, np.int32)
    return {"xq": stored, "xs": scale, "xz": zero_point}


def reference(op: RowOp, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Every output of ``build(op)``; float results are rounded once, from float64."""
    if op.groups > 1:
        parts = replace(op, m=op.m * op.groups, groups=1)
        split = {t.name: inputs[t.name].reshape(t.shape) for t in parts.inputs}
        return {name: y.reshape(op.m, -1) for name, y in reference(parts, split).items()}
    y = prologue(op, inputs).astype(np.float32)
    results: dict[str, Array] = {}
    if op.residual:
        results["sum"] = inputs["x"] + inputs["residual"]
    if op.epilogue in STATIC:
        results["y"] = static_levels(op, y).astype(np.float32) * np.float32(op.scale)
    elif op.stores_y:
        results["y"] = y
    if op.epilogue == "static_u8":
        results |= quantize_static_u8(op, y)
    if op.epilogue == "block":
        results |= quantize_block(y, op.group_size)
    if op.epilogue == "range":
        results["low"], results["high"] = row_ranges(y)
    if op.epilogue == "row_u8":
        results |= quantize_row_u8(y, op.k_padded, op.storage)
    return results
