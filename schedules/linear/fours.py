"""Weights of each channel dealt into groups of four whose products sum in 16 bits.

A weight times an activation, 0..255, is added to others in an int16 with a sign, so that weights
above 0 may sum to 128 at most, those below to -128 at least. In whole groups that holds of all four
weights, in halved ones of the first two and of the last two. Places that nothing fits hold weights
of 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE = 4
"""Weights of a group."""

_MOST = 128  # 128 * 255 < 2**15


@dataclass(frozen=True)
class Fours:
    """Groups of all channels, one channel's after the other's, its whole ones before the halved:
    ``wholes`` (n,) and ``halved`` (n,) say how many, ``places`` uint16 (groups, SIZE) are in k,
    ``weights`` int8 (groups, SIZE)."""

    wholes: np.ndarray
    halved: np.ndarray
    places: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class _Parts:
    """Weights that belong together, some of each channel, channel by channel: ``channels`` (parts,)
    and, of each, ``places`` and ``weights`` (parts, size)."""

    channels: np.ndarray
    places: np.ndarray
    weights: np.ndarray

    def __getitem__(self, which: np.ndarray) -> _Parts:
        return _Parts(self.channels[which], self.places[which], self.weights[which])

    def counts(self, n: int) -> np.ndarray:
        """How many of each of n channels."""
        return np.bincount(self.channels, minlength=n)

    def ranks(self, n: int) -> np.ndarray:
        """The number of each among those of its channel."""
        counts = self.counts(n)
        found: np.ndarray = (
            np.arange(len(self.channels)) - (counts.cumsum() - counts)[self.channels]
        )
        return found

    def beside(self, other: _Parts) -> _Parts:
        """Each with that of ``other``, which has as many of each channel."""
        assert (self.channels == other.channels).all()
        return _Parts(
            self.channels,
            np.concatenate([self.places, other.places], axis=1),
            np.concatenate([self.weights, other.weights], axis=1),
        )

    def filled(self, size: int) -> _Parts:
        """With weights of 0 behind."""
        more = ((0, 0), (0, size - self.places.shape[1]))
        return _Parts(self.channels, np.pad(self.places, more), np.pad(self.weights, more))

    def singles(self) -> _Parts:
        """Each weight alone."""
        channels = self.channels.repeat(self.places.shape[1])
        return _Parts(channels, self.places.reshape(-1, 1), self.weights.reshape(-1, 1))


def _joined(parts: list[_Parts]) -> _Parts:
    """Those of several lists, channel by channel."""
    channels = np.concatenate([one.channels for one in parts])
    order = np.argsort(channels, kind="stable")
    places = np.concatenate([one.places for one in parts])
    weights = np.concatenate([one.weights for one in parts])
    return _Parts(channels[order], places[order], weights[order])


def _twos(magnitudes: np.ndarray, sign: int) -> tuple[_Parts, _Parts]:
    """(n, k) of one sign, 0 where there is none -> as many twos that fit as there can be, each a
    large one and a small one, and the rest as singles."""
    n = len(magnitudes)
    rows, first, end = np.arange(n), np.zeros(n, np.int64), (magnitudes > 0).sum(axis=1)
    most = max(1, int(end.max()))
    # Bytes are sorted in a time that grows with their number alone.
    order = np.argsort((255 - magnitudes).astype(np.uint8), axis=1, kind="stable")[:, :most]
    sizes = np.take_along_axis(magnitudes, order, axis=1)
    shape = (n, most, 2)
    places, weights = np.zeros(shape, np.uint16), np.zeros(shape, np.int16)
    number = 0
    while (first < end).any():
        last = np.maximum(end - 1, 0)
        at = np.minimum(first, last)
        large, small = sizes[rows, at], sizes[rows, last]
        two = (first < last) & (large + small <= _MOST)
        places[:, number, 0], places[:, number, 1] = order[rows, at], order[rows, last] * two
        weights[:, number, 0] = large * (first < end)
        weights[:, number, 1] = small * two
        first += 1
        end -= two
        number += 1
    channels, used = rows.repeat(most).reshape(n, most), weights != 0
    every = _Parts(channels, places, sign * weights)
    return every[used[:, :, 1]], _first(every[used[:, :, 0] & ~used[:, :, 1]])


def _first(parts: _Parts) -> _Parts:
    return _Parts(parts.channels, parts.places[:, :1], parts.weights[:, :1])


def deal(weight: np.ndarray) -> Fours:
    """int8 (n, k) -> its weights that are not zero in groups."""
    n, wide = len(weight), weight.astype(np.int16)
    twos, ones = zip(
        *(_twos(np.maximum(sign * wide, 0), sign) for sign in (1, -1)), strict=True
    )  # fmt: skip
    wholes: list[_Parts] = []
    pairs: list[_Parts] = []
    # Singles of both signs fit each other; others the halves of twos of the other sign.
    counts = [one.counts(n) for one in ones]
    even = np.minimum(*counts)
    pairs.append(ones[0][_below(ones[0], even)].beside(ones[1][_below(ones[1], even)]))
    broken = [np.minimum((counts[1 - s] - even) // 2, twos[s].counts(n)) for s in (0, 1)]
    for s in (0, 1):
        met = even + 2 * broken[1 - s]
        halves = twos[1 - s][_below(twos[1 - s], broken[1 - s])].singles()
        among = _below(ones[s], met) & ~_below(ones[s], even)
        pairs.append(ones[s][among].beside(halves))
        pairs.append(ones[s][~_below(ones[s], met)].filled(2))
    # Twos of both signs are a whole group, and so are some of one sign.
    left = [two[~_below(two, b)] for two, b in zip(twos, broken, strict=True)]
    even = np.minimum(*(two.counts(n) for two in left))
    wholes.append(left[0][_below(left[0], even)].beside(left[1][_below(left[1], even)]))
    for s in (0, 1):
        first, second, alone = _by_two(left[s][~_below(left[s], even)], n)
        both = first.beside(second)
        fits = np.abs(both.weights.sum(axis=1)) <= _MOST
        wholes.append(both[fits])
        pairs += [first[~fits], second[~fits], alone]
    first, second, alone = _by_two(_joined(pairs), n)
    whole, halved = _joined(wholes), _joined([first.beside(second), alone.filled(SIZE)])
    every = _joined([whole, halved])
    return Fours(whole.counts(n), halved.counts(n), every.places, every.weights.astype(np.int8))


def _below(parts: _Parts, counts: np.ndarray) -> np.ndarray:
    """Which are among the first ``counts`` (n,) of their channel."""
    found: np.ndarray = parts.ranks(len(counts)) < counts[parts.channels]
    return found


def _by_two(parts: _Parts, n: int) -> tuple[_Parts, _Parts, _Parts]:
    """Neighbours of a channel: the first of each two, the second, and who has no neighbour."""
    ranks, last = parts.ranks(n), parts.counts(n)[parts.channels] - 1
    odd = ranks % 2 == 1
    return parts[~odd & (ranks < last)], parts[odd], parts[~odd & (ranks == last)]
