"""Zeros as tools that prune leave them: patterns of a weight's zeros, and whole models of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

Pattern = Callable[[np.ndarray], np.ndarray]
"""A weight (n, k) -> the same with its smallest parts at zero."""


def _sizes(weight: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The sum of squares of each block, (n / rows, k / columns), parts of blocks included."""
    n, k = weight.shape
    squares = np.pad(weight.astype(np.float64) ** 2, ((0, -n % rows), (0, -k % columns)))
    return squares.reshape(-1, rows, squares.shape[1] // columns, columns).sum(axis=(1, 3))


def neighbours(kept: int, size: int, weight: np.ndarray) -> np.ndarray:
    """``kept`` of every ``size`` neighbours of a row."""
    n, k = weight.shape
    parts = np.pad(np.abs(weight), ((0, 0), (0, -k % size))).reshape(n, -1, size)
    order = parts.argsort(axis=2, kind="stable").argsort(axis=2)
    return np.where((order >= size - kept).reshape(n, -1)[:, :k], weight, 0).astype(weight.dtype)


def blocks(rows: int, columns: int, share: float, weight: np.ndarray) -> np.ndarray:
    """``share`` of the blocks at zero."""
    n, k = weight.shape
    sizes = _sizes(weight, rows, columns)
    kept = sizes > np.quantile(sizes, share)
    whole = np.repeat(np.repeat(kept, rows, axis=0), columns, axis=1)[:n, :k]
    return np.where(whole, weight, 0).astype(weight.dtype)


def broken(weight: np.ndarray) -> np.ndarray:
    """2:4 with one weight too many, in the middle."""
    found = neighbours(2, 4, weight)
    row, first = len(weight) // 2, weight.shape[1] // 8 * 4
    four = found[row, first : first + 4]
    four[np.flatnonzero(four == 0)[0]] = np.abs(weight).max()
    return found


PATTERNS: dict[str, Pattern] = {
    "2-4": partial(neighbours, 2, 4),
    "1-4": partial(neighbours, 1, 4),
    "8x4": partial(blocks, 8, 4, 0.7),
    "1x4": partial(blocks, 1, 4, 0.8),
    "16x1": partial(blocks, 16, 1, 0.5),
    "free": partial(blocks, 1, 1, 0.8),
    "broken": broken,
}


def prune(weights: dict[str, np.ndarray]) -> None:
    """Give each of the weights (n, k), views by name, another of PATTERNS, in turn."""
    patterns = list(PATTERNS.values())
    for index, weight in enumerate(weights.values()):
        weight[:] = patterns[index % len(patterns)](weight)


def cut(makers: list[np.ndarray], readers: list[np.ndarray], features: slice) -> None:
    """Features that nothing makes, weights (n, k) or biases (n,), and nothing reads (n, k)."""
    for maker in makers:
        maker[features] = 0
    for reader in readers:
        reader[:, features] = 0
