"""Weights and tables of every canonical format as float32."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from slmtvm.ir.reference.arrays import Array
from slmtvm.schedules.linear.packed_rows import unpack_rows
from slmtvm.schedules.linear.shape import FLOAT8

_BITS = {"int2": 2, "int4": 4}  # of formats with several values in a byte


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
    bits = _BITS.get(format, 0)
    values = unpack_rows(weight, columns, bits) if bits else weight
    default = 1 << (bits - 1) if bits else 0
    zeros = np.full(scales.shape, default) if zero_points is None else zero_points

    def spread(per: Array) -> Array:
        if group_channels:
            return np.repeat(per, group_channels, axis=0)[: len(values)]
        if group_size:
            return np.repeat(per, group_size, axis=1)[:, :columns]
        return per.reshape(-1, 1)

    offset = values.astype(np.float32) - spread(zeros).astype(np.float32)
    return np.asarray(offset * spread(scales).astype(np.float32))
