"""Weights and tables of every canonical format as float32."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from slmtvm.ir.reference.arrays import Array
from slmtvm.schedules.linear.shape import FLOAT8


def unpack_int4(packed: Array, columns: int) -> Array:
    """uint8 (n, bytes), low nibble first -> values 0..15 (n, columns)."""
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return np.asarray(nibbles[:, :columns])


def dequantize(
    weight: Array,
    scales: Array | None,
    zero_points: Array | None,
    *,
    format: str,
    group_size: int,
    columns: int,
    group_channels: int = 0,
) -> Array:
    """A weight or table in any canonical format as float32 (rows, columns)."""
    if format in ("f32", "f16"):
        return weight.astype(np.float32)
    if format == "bf16":
        return weight.view(ml_dtypes.bfloat16).astype(np.float32)
    assert scales is not None
    if format in FLOAT8:
        weight = weight.view(f"float8_{format}").astype(np.float32)
    values = unpack_int4(weight, columns) if format == "int4" else weight
    default = 8 if format == "int4" else 0
    zeros = np.full(scales.shape, default) if zero_points is None else zero_points

    def spread(per: Array) -> Array:
        if group_channels:
            return np.repeat(per, group_channels, axis=0)[: len(values)]
        if group_size:
            return np.repeat(per, group_size, axis=1)[:, :columns]
        return per.reshape(-1, 1)

    offset = values.astype(np.float32) - spread(zeros).astype(np.float32)
    return np.asarray(offset * spread(scales).astype(np.float32))
