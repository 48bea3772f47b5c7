"""Weights in the order that kernels read them: panels of ``Isa.panel`` output channels."""

from __future__ import annotations

import numpy as np

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.linear.packed_rows import unpack_rows
from slmtvm.schedules.linear.shape import LinearShape


def unpacked(shape: LinearShape, weight: np.ndarray) -> np.ndarray:
    """A weight as ``slm.linear`` has quantized ones -> its values (n, k) as ``stored_dtype``."""
    return unpack_rows(weight, shape.k, shape.bits).view(shape.stored_dtype)


def pack_quantized(
    shape: LinearShape, isa: Isa, weight: np.ndarray, padding: np.ndarray
) -> np.ndarray:
    """A weight in the order in which kernels read it, (panels, stored_k, isa.panel).

    padding: (panels * isa.panel, padded_k), what stands where the weight has no value.
    """
    whole = padding
    whole[: shape.n, : shape.k] = unpacked(shape, weight)
    if shape.bits > 8:
        return panels_of_rows(whole, isa.panel)
    packed = panels_of_fields(whole, isa.panel, isa.k_step, shape.bits)
    return packed.reshape(len(whole) // isa.panel, -1, isa.panel)


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
