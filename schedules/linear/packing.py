"""Weights in the order that kernels read them: panels of ``Isa.panel`` output channels."""

from __future__ import annotations

import numpy as np

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.linear.shape import LinearShape


def unpack_nibbles(packed: np.ndarray, k: int) -> np.ndarray:
    """uint8 (n, ceil(k / 2)), low nibble first -> uint8 (n, k), values 0..15."""
    both = np.stack([packed & 0x0F, packed >> 4], axis=-1)
    return both.reshape(packed.shape[0], -1)[:, :k]


def unpacked(shape: LinearShape, weight: np.ndarray) -> np.ndarray:
    """A weight as ``slm.linear`` has int4 and int8 ones -> its bytes (n, k), one for each value."""
    if shape.format == "int4":
        return unpack_nibbles(weight, shape.k)
    return weight.view(shape.byte_dtype)


def pack_quantized(
    shape: LinearShape, isa: Isa, weight: np.ndarray, padding: np.ndarray
) -> np.ndarray:
    """A weight in the order in which kernels read it, (panels, padded_k * bits / 8, isa.panel).

    padding: bytes (panels * isa.panel, padded_k), what stands where the weight has no value.
    """
    whole = padding
    whole[: shape.n, : shape.k] = unpacked(shape, weight)
    to_panels = panels_of_nibbles if shape.format == "int4" else panels_of_bytes
    return to_panels(whole, isa.panel, isa.k_step).reshape(len(whole) // isa.panel, -1, isa.panel)


def pad(values: np.ndarray, rows: int, columns: int, fill: int | float = 0) -> np.ndarray:
    """``values`` (n, c) grown to (rows, columns)."""
    n, c = values.shape
    return np.pad(values, ((0, rows - n), (0, columns - c)), constant_values=fill)


def panels_of_rows(values: np.ndarray, panel: int) -> np.ndarray:
    """(panels * panel, c) -> (panels, c, panel): what a kernel reads for one c is together."""
    rows, columns = values.shape
    return np.ascontiguousarray(values.reshape(rows // panel, panel, columns).transpose(0, 2, 1))


def panels_of_bytes(values: np.ndarray, panel: int, k_step: int) -> np.ndarray:
    """Bytes (panels * panel, k) -> (panels, k / k_step, panel, k_step)."""
    rows, k = values.shape
    split = values.reshape(rows // panel, panel, k // k_step, k_step)
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3))


def panels_of_nibbles(values: np.ndarray, panel: int, k_step: int) -> np.ndarray:
    """uint8 0..15 (panels * panel, k) -> uint8 (panels, k / (2 k_step), panel, k_step).

    A byte holds one value of the first k_step in its low nibble, of the next k_step in its high.
    """
    rows, k = values.shape
    split = values.reshape(rows // panel, panel, k // (2 * k_step), 2, k_step)
    low, high = split[:, :, :, 0], split[:, :, :, 1]
    return np.ascontiguousarray((low | (high << 4)).transpose(0, 2, 1, 3))
