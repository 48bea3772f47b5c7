"""Rows of values of 2 or 4 bits in bytes, the first in the lowest bits; wider ones as they are."""

from __future__ import annotations

import numpy as np


def unpack_rows(packed: np.ndarray, columns: int, bits: int) -> np.ndarray:
    """Bytes (n, ceil(columns * bits / 8)) -> values (n, columns), uint8 if of 2 or 4 bits."""
    if bits >= 8:
        return packed
    fields = np.stack([packed >> s & (1 << bits) - 1 for s in range(0, 8, bits)], axis=-1)
    return np.asarray(fields.reshape(len(packed), -1)[:, :columns])


def pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of ``unpack_rows``."""
    if bits >= 8:
        return values
    n, k = values.shape
    each = 8 // bits
    padded = np.zeros((n, -(-k // each) * each), np.uint8)
    padded[:, :k] = values
    parts = padded.reshape(n, -1, each) << np.arange(0, 8, bits, dtype=np.uint8)
    return np.asarray(np.bitwise_or.reduce(parts, axis=-1))
