"""Offsets for buffers whose lifetimes are known: what is not alive together shares memory."""

from __future__ import annotations

from dataclasses import dataclass

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True)
class Lifetime:
    """A buffer of ``size`` bytes, first written at step ``first``, last read at step ``last``."""

    size: int
    first: int
    last: int


def align(size: int) -> int:
    """``size`` rounded up to a whole number of cache lines."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def place(lifetimes: list[Lifetime], base: int = 0) -> tuple[list[int], int]:
    """Offsets of the buffers from ``base`` up, and the end of the highest.

    Greedy by size: the largest buffers first, each at the lowest offset that is free during its
    life (Pisarchyk and Lee, arXiv:2001.03288).
    """
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    for index in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].size, i)):
        this = lifetimes[index]
        offset = base
        for other in sorted(placed, key=lambda i: offsets[i]):
            that = lifetimes[other]
            overlap = that.first <= this.last and this.first <= that.last
            if overlap and offset + align(this.size) > offsets[other]:
                offset = max(offset, offsets[other] + align(that.size))
        offsets[index] = offset
        placed.append(index)
    end = max((o + align(b.size) for o, b in zip(offsets, lifetimes, strict=True)), default=base)
    return offsets, end
