"""What kernels on sparse weights ask of an ISA beside ``base``'s dot products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

Expr = Any  # a TIR expression, or for operands of a step what the ISA makes of it
Buffer = Any
Vectors = tuple[Expr, ...]


@dataclass(frozen=True)
class Window:
    """``kept`` weights at most of every ``size`` consecutive k of a channel."""

    kept: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.kept}of{self.size}"


WINDOWS = {w.name: w for w in (Window(4, 16), Window(8, 16), Window(4, 8))}
"""By name. 4 of 16 holds what 1:4, 2:8 and 4:16 do; 8 of 16, and 4 of 8, what 2:4 and 4:8 do."""

PAIRS = Window(2, 4)
"""What int4 weights in groups pick from: their places take 2 bits."""

PAIR_CHOICES = tuple(combinations(range(PAIRS.size), PAIRS.kept))
"""The places that two weights can have there, in order."""


class Picking(ABC):
    """An exact int32 dot product of weights that pick their activations out of a window of k.

    A step multiplies 4 weights of each channel, whose places are nibbles. The sum that ``finish``
    returns lacks what ``missing`` says of a channel, whatever its activations.
    """

    state: tuple[str, ...]

    signs: bool = False
    """Whether a place has the weight's sign in its highest bit, and the weight is a magnitude."""

    @abstractmethod
    def row(self, buffer: Buffer, at: Expr) -> Expr:
        """The activations of the window that begins at ``at``, for ``step`` to pick from."""

    @abstractmethod
    def places(self, raw: Expr) -> tuple[Expr, Expr]:
        """Bytes as read -> the places of the steps in their lower and their upper halves."""

    @abstractmethod
    def weights(self, raw: Expr) -> Expr:
        """The operand of a step that one vector of stored weights is."""

    @abstractmethod
    def step(self, state: Vectors, weight: Expr, places: Expr, row: Expr) -> Vectors:
        """``state`` plus one step."""

    def missing(self, weights: np.ndarray) -> np.ndarray | None:
        """What sums of ``weights`` (n, k) lack, (n,) int32; None where that is nothing."""
        return None

    def finish(self, state: Vectors) -> Expr:
        """The int32 vector of sums, one lane for each channel."""
        return state[0]


class RowPairs(ABC):
    """An exact int32 dot product of int8 weights, of which two pick from each 4 of k, with
    activations stored as "row_u8" says; see ``linear.row_pairs``. A step multiplies 4 weights."""

    @abstractmethod
    def places(self, buffer: Buffer, at: Expr) -> Expr:
        """The places of 4 steps."""

    @abstractmethod
    def weights(self, buffer: Buffer, at: Expr) -> Expr:
        """The weights of a step."""

    @abstractmethod
    def row(self, buffer: Buffer, at: Expr) -> Any:
        """The 8 activations of a step."""

    @abstractmethod
    def step(self, total: Expr, weight: Expr, places: Expr, number: int, row: Any) -> Expr:
        """``total`` plus the step of ``number``."""

    def of_tile(
        self, shape: Any, tile: Any, named: Mapping[str, Buffer]
    ) -> dict[tuple[int, int], Expr] | None:
        """The sums of all cells of a tile at once; None where steps have to make them."""
        return None


class PairPicking(ABC):
    """An exact int32 dot product of int4 weights, -8..7, of which two pick from each 4 of k.

    A step multiplies 4 weights of each channel, those of 8 consecutive k. The sum that ``finish``
    returns is ``sum(w (a + offset))`` for activations a, -127..127.
    """

    state: tuple[str, ...]
    offset: int = 0
    max_steps: int | None = None
    """How many steps a state can take; None for as many as a group has."""

    @abstractmethod
    def row(self, buffer: Buffer, at: Expr) -> list[Expr]:
        """What each of four steps picks from, of 32 activations from ``at``."""

    @abstractmethod
    def weights(self, raw: Expr) -> tuple[Expr, Expr]:
        """Bytes of two nibbles, w + 8 -> the operands of two steps, the lower ones first."""

    @abstractmethod
    def places(self, raw: Expr) -> list[Expr]:
        """Bytes of four places among 4 of k, by bits from the lowest on -> what four steps take.

        A channel has four bytes: two weights of the first 4 of k, two of the next.
        """

    @abstractmethod
    def step(self, state: Vectors | None, weight: Expr, places: Expr, row: Expr) -> Vectors:
        """``state`` plus one step; None is a state of zeros."""

    def finish(self, state: Vectors) -> Expr:
        """The int32 vector of sums, one lane for each channel."""
        return state[0]


class TurnedPairs(ABC):
    """An exact dot product of a group of int4 weights of one channel, -8..7, of which two meet a
    pair of each 4 of k, with a vector of ``rows``, their activations -127..127.

    A state is int16, as are pairs; sums of a group fit it, whatever it wraps around in between.
    """

    rows: int

    @abstractmethod
    def choices(self, words: Sequence[Expr]) -> list[Expr]:
        """Four activations of each of ``rows`` rows, int32 vectors -> the PAIR_CHOICES of them."""

    @abstractmethod
    def places(self, raw: Expr) -> list[Expr]:
        """Places as ``PairPicking.places`` has them, ascending -> for four steps a uint16 vector:
        which of PAIR_CHOICES two weights take: one of them whatever is given."""

    @abstractmethod
    def start(self, sums: Expr) -> Expr:
        """What states begin with where the weights' sums are these, an int16 for each."""

    @abstractmethod
    def step(self, state: Expr, weights: Expr, pairs: Expr) -> Expr:
        """``state`` plus one step: two weights in each lane, and a choice."""

    @abstractmethod
    def finish(self, state: Expr) -> list[Expr]:
        """float32 vectors of sums, the first rows' first."""


@dataclass(frozen=True)
class ListCost:
    """What a kernel on lists of blocks takes, in steps of a dense kernel on as many channels.

    ``step`` for each block; ``ends`` for a list's beginning and end, which is hard to predict.
    """

    step: float
    ends: float
