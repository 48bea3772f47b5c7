"""The queries that a block of an attention kernel computes together, and their memory."""

from __future__ import annotations

from dataclasses import dataclass

from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.vector import LANES, Expr


@dataclass(frozen=True)
class Query:
    """A query head of a row: where its query and output begin, and what it sees.

    It sees positions ``first`` (None: 0) to ``last``. ``bias_at``: where the bias of position 0
    lies, None without one. Where a mask is a list of blocks, ``tile`` has the list, and its row of
    it is ``tile_row``. ``member``: which query head of its kv head's it is.
    """

    query_at: Expr
    output_at: Expr
    first: Expr | None
    last: Expr
    bias_at: Expr | None
    index: Expr  # its row of the memory for scores
    maximum_at: Expr  # where its largest score lies there
    tile: Expr | None = None
    tile_row: Expr | None = None
    member: int = 0


@dataclass(frozen=True)
class Scratch:
    """Memory for scores: a row for each query, then the rows' maxima, then extra floats.

    A row is of ``capacity`` positions, those that the cache keeps.

    ``parts``: maxima of a row, where blocks of a kernel share its positions.

    Rows are a cache line longer than the capacity: at a multiple of 4096 bytes they would all fall
    into the same set of the cache.
    """

    rows: int
    capacity: int
    extra: int = 0
    parts: int = 1

    @property
    def stride(self) -> int:
        return self.capacity + LANES

    @property
    def maxima(self) -> int:
        return self.rows * self.stride

    @property
    def extra_at(self) -> int:
        return self.maxima + -(-self.rows * self.parts // LANES) * LANES

    @property
    def size(self) -> int:
        return self.extra_at + self.extra

    @property
    def tensor(self) -> Tensor:
        return Tensor("scratch", (self.size,), "float32")
