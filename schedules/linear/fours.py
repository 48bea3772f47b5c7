"""Weights of each channel dealt into groups of four whose products sum in 16 bits.

A weight times an activation, 0..255, is added to others in an int16 with a sign: weights of a group
that are above 0 sum to 128 at most, those below to -128 at least. Groups have four places; those
that nothing fits hold weights of 0. As few groups as a greedy choice finds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE = 4
"""Weights of a group."""

_MOST = 128  # 128 * 255 < 2**15


@dataclass(frozen=True)
class Fours:
    """Groups of all channels, one channel's after the other's: ``counts`` (n,) of each channel,
    ``places`` uint16 (groups, SIZE) in k, and ``weights`` int8 (groups, SIZE)."""

    counts: np.ndarray
    places: np.ndarray
    weights: np.ndarray


class _Side:
    """The weights of one sign of every channel, as magnitudes from the largest to the smallest:
    those from ``first`` up to ``end`` are left."""

    def __init__(self, magnitudes: np.ndarray) -> None:
        self.first = np.zeros(len(magnitudes), np.int64)
        self.end = (magnitudes > 0).sum(axis=1)
        most = max(1, int(self.end.max()))
        # Bytes are sorted in a time that grows with their number alone.
        descending = (255 - magnitudes).astype(np.uint8)
        self.order = np.argsort(descending, axis=1, kind="stable")[:, :most]
        self.sizes = np.take_along_axis(magnitudes, self.order, axis=1)
        self._rows = np.arange(len(magnitudes))

    @property
    def left(self) -> np.ndarray:
        """How many, (n,)."""
        found: np.ndarray = self.end - self.first
        return found

    def smallest(self, which: int = 0) -> np.ndarray:
        """The magnitude of the smallest but ``which``; too much where there is none."""
        at = self.end - 1 - which
        found = self.sizes[self._rows, np.maximum(at, 0)]
        return np.where(at >= self.first, found, _MOST + 1)

    def take(self, channels: np.ndarray, largest: bool) -> tuple[np.ndarray, np.ndarray]:
        """Take one weight of each of ``channels``: its k and its magnitude."""
        if largest:
            at = self.first[channels]
            self.first[channels] += 1
        else:
            self.end[channels] -= 1
            at = self.end[channels]
        return self.order[channels, at], self.sizes[channels, at]


class _Round:
    """A group of each channel, as far as there are weights: ``places`` and ``weights`` (n, SIZE)
    are filled from the left, ``sums`` (2, n) are the magnitudes of both signs."""

    def __init__(self, sides: tuple[_Side, _Side], n: int) -> None:
        self._sides = sides
        self.places = np.zeros((n, SIZE), np.uint16)
        self.weights = np.zeros((n, SIZE), np.int16)
        self._sums = np.zeros((2, n), np.int32)
        self._filled = np.zeros(n, np.int64)

    def choose(self) -> None:
        """Take what goes well together."""
        more = self._sides[1].left > self._sides[0].left  # which sign has more weights left
        # Three small ones beside a large one of the other sign, until signs are even.
        for sign in (0, 1):
            mine, other = self._sides[sign], self._sides[1 - sign]
            three = mine.smallest(0) + mine.smallest(1) + mine.smallest(2)
            uneven = (more == bool(sign)) & (mine.left - other.left >= 2) & (three <= _MOST)
            for _ in range(SIZE - 1):
                self._take(sign, uneven, largest=False)
        # The largest of both signs, and the smallest that have room beside them.
        for sign in (0, 1):
            self._take(sign, (self._sums[sign] == 0) & (self._sides[sign].left > 0), largest=True)
        for _ in range(SIZE - 1):
            room = self._filled < SIZE
            fits = [room & (self._sides[s].smallest() + self._sums[s] <= _MOST) for s in (0, 1)]
            second = fits[1] & (~fits[0] | (self._sides[1].left > self._sides[0].left))
            self._take(0, fits[0] & ~second, largest=False)
            self._take(1, second, largest=False)

    def _take(self, sign: int, wanted: np.ndarray, largest: bool) -> None:
        (channels,) = wanted.nonzero()
        if not len(channels):
            return
        at, size = self._sides[sign].take(channels, largest)
        filled = self._filled[channels]
        self.places[channels, filled] = at
        self.weights[channels, filled] = -size if sign else size
        self._sums[sign, channels] += size
        self._filled[channels] += 1


def deal(weight: np.ndarray) -> Fours:
    """int8 (n, k) -> its weights that are not zero in groups."""
    wide = weight.astype(np.int16)
    sides = (_Side(np.maximum(wide, 0)), _Side(np.maximum(-wide, 0)))
    rounds = [_Round(sides, len(weight))]  # the first may be empty
    rounds[0].choose()
    while sides[0].left.any() or sides[1].left.any():
        rounds.append(_Round(sides, len(weight)))
        rounds[-1].choose()
    places = np.stack([one.places for one in rounds], axis=1)
    weights = np.stack([one.weights for one in rounds], axis=1).astype(np.int8)
    used = weights.any(axis=2)
    return Fours(used.sum(axis=1), places[used], weights[used])
