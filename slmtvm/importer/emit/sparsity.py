"""Weights pruned to at most n values other than zero among every m neighbours along k."""

from __future__ import annotations

import numpy as np

from slmtvm.importer.graph import Array
from slmtvm.importer.recognise.steps import Weights
from slmtvm.schedules.linear.packed_rows import unpack_rows

_PATTERNS = ((1, 4), (2, 4), (4, 8))  # the sparsest first; 2:4 is what accelerators have
_SAMPLE, _CHUNK = 16, 1024  # rows: most weights show in a few that they are dense
_MAGNITUDE = {"bf16": 0x7FFF}  # of a float's bits; zero may have a sign
_MAGNITUDE_FLOAT8 = 0x7F


def sparsity_of(weights: Weights, k: int) -> str:
    """ "2:4" where among 4 neighbours of a row at most 2 are not zero, and so on; "" if dense."""
    rows = len(weights.weight.array)
    for n, m in _PATTERNS:
        if k >= m and all(
            _fits(weights, slice(start, start + size), k, n, m)
            for start, size in ((0, _SAMPLE), *((s, _CHUNK) for s in range(0, rows, _CHUNK)))
        ):
            return f"{n}:{m}"
    return ""


def _fits(weights: Weights, rows: slice, k: int, n: int, m: int) -> bool:
    used = _nonzero(weights, rows, k)
    whole = used[:, : k // m * m].reshape(len(used), -1, m)
    return bool((whole.sum(axis=2) <= n).all() and used.any())


def _nonzero(weights: Weights, rows: slice, k: int) -> Array:
    """Which weights of some rows are not zero, (rows, k)."""
    stored = weights.weight.array[rows]
    if weights.format in ("f32", "f16"):
        return np.asarray(stored != 0)
    if not weights.format.startswith("int"):
        return np.asarray((stored & _MAGNITUDE.get(weights.format, _MAGNITUDE_FLOAT8)) != 0)
    values = unpack_rows(stored, k, weights.bits)
    if weights.zero_points is None:
        return np.asarray(values != weights.default_zero)
    zeros = weights.zero_points.array
    if weights.group_channels:
        channels = np.arange(rows.start, rows.start + len(values))
        return np.asarray(values != zeros[channels // weights.group_channels])
    zeros = zeros[rows] if len(zeros) == len(weights.weight.array) else zeros
    by_row = zeros.reshape(len(zeros), -1)
    spread = np.repeat(by_row, weights.group_size or k, axis=1)[:, :k]
    return np.asarray(values != spread)
