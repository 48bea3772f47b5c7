"""Zeros in weights: how many there are, and whether they make a pattern.

Zeros are weights at their zero point. A block of 8x4 is 8 output channels by 4 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from slmtvm.importer.graph import Array
from slmtvm.importer.recognise.steps import Weights
from slmtvm.schedules.isa import PAIRS, WINDOWS
from slmtvm.schedules.linear.packed_rows import unpack_rows
from slmtvm.schedules.linear.shape import PAIR_UNIT

_OF_NEIGHBOURS = ((1, 4), (2, 8), (2, 4), (4, 8))  # the sparsest first; 2:4 is what GPUs have
_BLOCKS = ((32, 4), (32, 1), (16, 1), (8, 4), (4, 4), (4, 1), (1, 4))  # the largest first
KERNEL_BLOCKS = ((8, 4), (32, 1), (16, 1), (1, 4))
"""Blocks that kernels skip: on x86 and Arm, on RISC-V (both), and on x86 and Arm by many rows."""

_SAMPLE, _CHUNK = 64, 1024  # rows: most weights show in a few that they are dense
_FEW = 0.25  # zeros: 4-bit weights have nearly half as many by rounding alone
_MOST = 0.9  # of the zeros lie in whole blocks, where a pattern is one of blocks
_MAGNITUDE = {"bf16": 0x7FFF}  # of a float's bits; zero may have a sign
_MAGNITUDE_FLOAT8 = 0x7F


@dataclass(frozen=True)
class Sparsity:
    """``pattern``: "2:4" where among 4 neighbours of a row at most 2 are not zero, and so on; "8x4"
    where zeros lie in such blocks, "rows" and "columns" where these are output channels and inputs;
    "unstructured"; "" for a weight that counts as dense. ``zeros``: their share, and ``used``: the
    share of KERNEL_BLOCKS that hold any other weight; both only known where there is a pattern.
    ``windows``: those of ``schedules.isa.base.WINDOWS`` that hold all other weights, of int8; PAIRS
    where that holds those of int4 in groups.
    """

    pattern: str = ""
    zeros: float = 0.0
    used: dict[str, float] = field(default_factory=dict)
    windows: tuple[str, ...] = ()


def sparsity_of(weights: Weights, k: int) -> Sparsity:
    """What zeros there are in a weight of ``k`` inputs."""
    n = len(weights.weight.array)
    sample = nonzero(weights, np.unique(np.linspace(0, n - 1, min(n, _SAMPLE)).astype(int)), k)
    if sample.mean() > 1 - _FEW and sample.any(axis=1).all() and sample.any(axis=0).all():
        return Sparsity()
    counts = _Counts(n, k)
    for start in range(0, n, _CHUNK):
        counts.add(nonzero(weights, np.arange(start, min(start + _CHUNK, n)), k))
    found = counts.result()
    served = [*WINDOWS] * _fits_int8(weights) + [PAIRS.name] * _fits_int4(weights, k)
    return replace(found, windows=tuple(name for name in found.windows if name in served))


class _Counts:
    """Zeros of a weight whose rows come in parts of _CHUNK."""

    def __init__(self, n: int, k: int) -> None:
        self.n, self.k = n, k
        self.used = self.used_rows = 0
        self.used_columns = np.zeros(k, bool)
        self.fitting = [(a, b) for a, b in _OF_NEIGHBOURS if k >= b]
        self.windows = {**WINDOWS, PAIRS.name: PAIRS}
        self.blocks = dict.fromkeys({*_BLOCKS, *KERNEL_BLOCKS}, 0)  # those in use

    def add(self, used: Array) -> None:
        self.used += int(used.sum())
        self.used_rows += int(used.any(axis=1).sum())
        self.used_columns |= used.any(axis=0)
        self.fitting = [pair for pair in self.fitting if _fits(used, *pair)]
        self.windows = {
            name: window
            for name, window in self.windows.items()
            if _fits(_padded(used, 1, window.size), window.kept, window.size)
        }
        for rows, columns in self.blocks:
            tiles = _padded(used, rows, columns)
            split = tiles.reshape(len(tiles) // rows, rows, -1, columns)
            self.blocks[rows, columns] += int(split.any(axis=(1, 3)).sum())

    def result(self) -> Sparsity:
        total = self.n * self.k
        zeros = 1 - self.used / total
        used = {f"{r}x{c}": self.blocks[r, c] / self._number(r, c) for r, c in KERNEL_BLOCKS}
        pattern = self._pattern(zeros) if self.used else "rows"
        return Sparsity(pattern, zeros, used, tuple(self.windows)) if pattern else Sparsity()

    def _pattern(self, zeros: float) -> str:
        if self.fitting:
            return "{}:{}".format(*self.fitting[0])
        in_rows = 1 - self.used_rows / self.n
        in_columns = 1 - float(self.used_columns.mean())
        # A head or a channel that is cut off counts, however few there are.
        for name, share in (("rows", in_rows), ("columns", in_columns)):
            if share > 0 and share >= _MOST * zeros:
                return name
        if zeros < _FEW:
            return ""
        for rows, columns in _BLOCKS:
            share = 1 - self.blocks[rows, columns] / self._number(rows, columns)
            if share >= _MOST * zeros:
                return f"{rows}x{columns}"
        return "unstructured"

    def _number(self, rows: int, columns: int) -> int:
        return -(-self.n // rows) * -(-self.k // columns)


def _fits_int8(weights: Weights) -> bool:
    """Whether the weights are int8 once their zero points are taken off."""
    if weights.format != "int8" or weights.group_size or weights.group_channels:
        return False
    if weights.zero_points is None:
        return True
    values = weights.weight.array
    zeros = weights.zero_points.array.astype(np.int16).reshape(-1)
    low, high = values.min(axis=1) - zeros, values.max(axis=1) - zeros
    return bool(low.min() >= -128 and high.max() <= 127)


def _fits_int4(weights: Weights, k: int) -> bool:
    """Whether the weights are int4, in groups that kernels take, once their zero points are taken
    off."""
    if weights.format != "int4" or not weights.group_size or weights.group_size % PAIR_UNIT:
        return False
    if weights.zero_points is None:
        return True
    if weights.zero_points.array.dtype.kind == "f":
        return False
    values = unpack_rows(weights.weight.array, k, weights.bits).astype(np.int16)
    zeros = weights.zero_points.array.astype(np.int16).reshape(len(values), -1)
    plain = values - np.repeat(zeros, weights.group_size, axis=1)[:, :k]
    return bool(plain.min() >= -8 and plain.max() <= 7)


def _padded(used: Array, rows: int, columns: int) -> Array:
    """``used`` grown to whole blocks by zeros."""
    n, k = used.shape
    if n % rows == 0 and k % columns == 0:
        return used
    return np.pad(used, ((0, -n % rows), (0, -k % columns)))


def _fits(used: Array, n: int, m: int) -> bool:
    whole = used[:, : used.shape[1] // m * m].reshape(len(used), -1, m)
    return bool((whole.sum(axis=2) <= n).all())


def nonzero(weights: Weights, rows: Array, k: int) -> Array:
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
        return np.asarray(values != zeros[rows // weights.group_channels])
    zeros = zeros[rows] if len(zeros) == len(weights.weight.array) else zeros
    by_row = zeros.reshape(len(zeros), -1)
    spread = np.repeat(by_row, weights.group_size or k, axis=1)[:, :k]
    return np.asarray(values != spread)
