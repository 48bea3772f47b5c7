"""Weights in the order that kernels read them: panels of ``Isa.panel`` output channels."""

from __future__ import annotations

import numpy as np

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.linear.packed_rows import unpack_rows
from slmtvm.schedules.linear.shape import FLOAT8, LinearShape


def unpacked(shape: LinearShape, weight: np.ndarray) -> np.ndarray:
    """A weight as ``slm.linear`` has quantized ones -> its values (n, k) as ``stored_dtype``."""
    return unpack_rows(weight, shape.k, shape.bits).view(shape.stored_dtype)


def values(shape: LinearShape, weight: np.ndarray) -> np.ndarray:
    """What the stored numbers of such a weight are, float64 (n, k); float8 ones may be bytes."""
    if shape.format in FLOAT8:
        weight = weight.view(f"float8_{shape.format}")  # a dtype of ml_dtypes
        return np.asarray(weight.astype(np.float64))
    return unpacked(shape, weight).astype(np.float64)


def pack_quantized(
    shape: LinearShape, isa: Isa, weight: np.ndarray, padding: np.ndarray
) -> np.ndarray:
    """A weight in the order in which kernels read it, (panels, stored_k, isa.panel).

    padding: (panels * isa.panel, padded_k), what stands where the weight has no value.
    """
    whole = padding
    _fill(shape, whole[: shape.n], unpacked(shape, weight))
    if shape.bits > 8:
        return panels_of_rows(whole, isa.panel)
    packed = panels_of_fields(whole, isa.panel, isa.k_step, shape.bits)
    return packed.reshape(len(whole) // isa.panel, -1, isa.panel)


def _fill(shape: LinearShape, whole: np.ndarray, given: np.ndarray) -> None:
    """Write ``given`` (n, k) into ``whole`` (n, padded_k), each group where it is stored."""
    size = shape.group_size
    if not size or size == shape.stored_group:
        whole[:, : shape.k] = given
        return
    for group in range(shape.groups):
        part = given[:, group * size : (group + 1) * size]
        begin = group * shape.stored_group
        whole[:, begin : begin + part.shape[1]] = part


def pad(values: np.ndarray, rows: int, columns: int, fill: int | float = 0) -> np.ndarray:
    """``values`` (n, c) grown to (rows, columns)."""
    n, c = values.shape
    return np.pad(values, ((0, rows - n), (0, columns - c)), constant_values=fill)


def panels_of_rows(values: np.ndarray, panel: int) -> np.ndarray:
    """(panels * panel, c) -> (panels, c, panel): what a kernel reads for one c is together."""
    rows, columns = values.shape
    return np.ascontiguousarray(values.reshape(rows // panel, panel, columns).transpose(0, 2, 1))


def panels_of_fields(values: np.ndarray, panel: int, k_step: int, bits: int) -> np.ndarray:
    """Bytes that hold values of ``bits`` (panels * panel, k) -> bytes (panels, k * bits / 8 /
    k_step, panel, k_step).

    A byte holds one value of the first k_step in its lowest bits, then one of the next, and so on.
    """
    rows, k = values.shape
    each = 8 // bits
    split = values.reshape(rows // panel, panel, k // (each * k_step), each, k_step)
    packed = split[:, :, :, 0]
    for i in range(1, each):
        packed = packed | split[:, :, :, i] << i * bits
    return np.ascontiguousarray(packed.transpose(0, 2, 1, 3))
