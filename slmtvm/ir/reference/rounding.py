"""Activations rounded as the file says."""

from __future__ import annotations

import numpy as np

from slmtvm.ir.reference.arrays import Array, Attrs
from slmtvm.schedules import rows

_INT8_MAX, _UINT8_MAX = 127, 255


def quantize_blocks(x: Array, group_size: int) -> Array:
    """x rounded to symmetric int8 for each row and block of ``group_size``, scale amax / 127."""
    m, k = x.shape
    padded = np.zeros((m, -(-k // group_size) * group_size), np.float32)
    padded[:, :k] = x
    blocks = padded.reshape(m, -1, group_size)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    scale = largest / np.float32(_INT8_MAX)
    # A product with the inverse, as onnxruntime has it: a division rounds otherwise.
    full = np.full_like(largest, _INT8_MAX)
    inverse = np.divide(full, largest, out=np.zeros_like(largest), where=scale > 0)
    levels = np.rint(blocks * inverse)
    return np.asarray((levels * scale).reshape(m, -1)[:, :k])


def quantize_rows(x: Array) -> Array:
    """x rounded as ONNX DynamicQuantizeLinear does, each row on its own."""
    low = np.minimum(x.min(axis=1, keepdims=True), 0)
    high = np.maximum(x.max(axis=1, keepdims=True), 0)
    scale = ((high - low) / np.float32(_UINT8_MAX)).astype(np.float32)
    scale = np.where(scale == 0, np.float32(1), scale)  # what is no number stays so
    zero = np.clip(np.rint(-low / scale), 0, _UINT8_MAX)
    levels = np.clip(np.rint(x / scale) + zero, 0, _UINT8_MAX)
    return np.asarray(((levels - zero) * scale).astype(np.float32))


def quantize_dequantize(attrs: Attrs, x: Array) -> Array:
    return rounded(x, float(attrs["scale"]), int(attrs["low"]), int(attrs["high"]))


def integer_pair(attrs: Attrs, x: Array, y: Array) -> Array:
    return rows.pair.reference(rows.Pair.parse(str(attrs["pair"])), x, y)


def rescale(attrs: Attrs, x: Array, steps: Array) -> Array:
    return rows.rescale.reference(x, steps, float(attrs["unit"]))


def rounded(x: Array, scale: float | Array, low: float | Array, high: float | Array) -> Array:
    """What ``quantize_dequantize`` does, in the precision of x; arrays are broadcast to x.

    What is no number stays so.
    """
    step = np.asarray(scale, np.float32)
    return np.asarray(np.rint(np.clip(x / step, low, high)) * step)
