"""Which weights of a matrix stay: n of every m along k, blocks, or the largest of each row."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from slmtvm.errors import SlmError

Array = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]

_OF_NEIGHBOURS = re.compile(r"(\d+):(\d+)")
_BLOCKS = re.compile(r"block:(\d+)x(\d+)")
MAX_STEP = 64  # of n:m, and k of a block


class Pattern(ABC):
    """Chooses weights by their scores: the larger, the more is lost where the weight goes."""

    step: int
    """Values of k that are chosen together; a matrix may have any k."""

    late: ClassVar[bool] = False
    """Whether each ``step`` of k chooses for itself, and not as a part of many."""

    @abstractmethod
    def keep(self, scores: Array) -> Mask:
        """Which of the weights whose scores are (n, some multiple of ``step`` along k) stay."""


@dataclass(frozen=True)
class Neighbours(Pattern):
    """``kept`` of every ``step`` neighbours along k, in each row of n."""

    kept: int
    step: int
    late: ClassVar[bool] = True

    def keep(self, scores: Array) -> Mask:
        n, k = scores.shape
        parts = scores.reshape(n, k // self.step, self.step)
        # Of equal scores the first stays.
        order = np.argsort(np.argsort(-parts, axis=2, kind="stable"), axis=2, kind="stable")
        return np.asarray(order < self.kept).reshape(n, k)


@dataclass(frozen=True)
class Blocks(Pattern):
    """All but ``sparsity`` of the blocks of ``channels`` outputs by ``step`` values of k."""

    channels: int
    step: int
    sparsity: float

    def keep(self, scores: Array) -> Mask:
        n, k = scores.shape
        rows = -(-n // self.channels)
        padded = np.pad(scores, ((0, rows * self.channels - n), (0, 0)))
        blocks = padded.reshape(rows, self.channels, k // self.step, self.step).sum(axis=(1, 3))
        stays = largest(blocks.reshape(-1), self.sparsity).reshape(blocks.shape)
        whole = np.repeat(np.repeat(stays, self.channels, axis=0), self.step, axis=1)
        return np.asarray(whole[:n])


@dataclass(frozen=True)
class Free(Pattern):
    """All but ``sparsity`` of the weights of each row of n."""

    sparsity: float
    step: int = 1

    def keep(self, scores: Array) -> Mask:
        return np.stack([largest(row, self.sparsity) for row in scores])


def largest(scores: Array, sparsity: float) -> Mask:
    """All of ``scores`` (count,) but the smallest ``sparsity`` of them; of equal ones the first
    stay."""
    order = np.argsort(-scores, kind="stable")
    stays = np.zeros(scores.shape, np.bool_)
    stays[order[: scores.size - round(sparsity * scores.size)]] = True
    return stays


def parse_pattern(text: str, sparsity: float | None) -> Pattern:
    """The pattern that ``text`` names: "n:m", "block:CHANNELSxK" or "free".

    sparsity: the part of the weights that goes, 0.5 where it is None; n:m says it itself.
    Raises SlmError where ``text`` names none, or contradicts ``sparsity``.
    """
    if sparsity is not None and not 0 < sparsity < 1:
        raise SlmError(f"a sparsity of {sparsity:g}; it must be between 0 and 1")
    part = 0.5 if sparsity is None else sparsity
    if found := _OF_NEIGHBOURS.fullmatch(text):
        kept, step = int(found[1]), int(found[2])
        if not 0 < kept < step <= MAX_STEP:
            raise SlmError(f"pattern {text}: the first number must be less, the second at most 64")
        if sparsity is not None and abs(sparsity - (1 - kept / step)) > 1e-9:
            raise SlmError(f"pattern {text} has a sparsity of {1 - kept / step:g}: leave it out")
        return Neighbours(kept, step)
    if found := _BLOCKS.fullmatch(text):
        channels, step = int(found[1]), int(found[2])
        if channels < 1 or not 0 < step <= MAX_STEP:
            raise SlmError(f"pattern {text}: blocks take 1 to 64 values of k")
        return Blocks(channels, step, part)
    if text == "free":
        return Free(part)
    raise SlmError(f"pattern {text!r}; there are n:m (2:4), block:CHANNELSxK (block:8x4) and free")
