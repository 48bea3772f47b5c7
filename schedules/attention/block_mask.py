"""Masks of any pattern: lists of the blocks of keys that rows see, which kernels walk.

A list is for a tile of 16 positions, of blocks of 16 keys in order; for each there is a word of 16
bits by row, bit j for key j. Where a step may begin at any position, a tile's list is that of 32
rows, so that rows of one kernel's block always find theirs in the list of the first one's tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.vector import LANES

Array = np.ndarray
WHOLE = 0xFFFF


@dataclass(frozen=True)
class BlockMask:
    """The sizes of a mask's tables: ``rows`` of a list, ``tiles``, ``entries`` of all lists and
    the ``most`` of one; ``masks``: one for all kv heads, or one for each, and ``members``: one for
    all query heads that share a kv head, or one for each."""

    rows: int
    tiles: int
    entries: int
    most: int
    masks: int = 1
    members: int = 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Where the lists begin; their blocks, twice the number, one more where all of it is seen
        by all rows; the words."""
        return (
            Tensor("block_begins", (self.masks * self.tiles + 1,), "int32"),
            Tensor("block_places", (self.entries,), "int32"),
            Tensor("block_bits", (self.entries, self.members, self.rows), "uint16"),
        )

    def name(self) -> str:
        """All that kernels depend on."""
        return (
            f"blocks{self.rows}x{self.tiles}x{self.entries}x{self.most}m{self.masks}x{self.members}"
        )


def block_tables(
    visible: Array, num_kv_heads: int, capacity: int, *, rows: int
) -> tuple[BlockMask, dict[str, Array]]:
    """The tables of ``visible``, bool (1 or num_heads, n, n), for ``capacity`` >= n positions.

    Positions from n on, which are padding, see themselves alone. ``rows``: 16 or 32, see above.
    """
    n = visible.shape[-1]
    by_head = visible.reshape(1 if len(visible) == 1 else num_kv_heads, -1, n, n)
    if (by_head == by_head[:, :1]).all():
        by_head = by_head[:, :1]
        if (by_head == by_head[:1]).all():
            by_head = by_head[:1]
    masks, members = by_head.shape[:2]
    blocks = capacity // LANES
    whole = np.zeros((masks, members, capacity + rows - LANES, capacity), bool)
    whole[:, :, :n, :n] = by_head
    places = np.arange(n, capacity)
    whole[:, :, places, places] = True
    begins, found, words = [0], [], []
    for mask in whole:
        for tile in range(blocks):
            seen = mask[:, tile * LANES : tile * LANES + rows].reshape(members, rows, blocks, LANES)
            for block in np.flatnonzero(seen.any(axis=(0, 1, 3))):
                bits = seen[:, :, block] @ (1 << np.arange(LANES))
                found.append(2 * block + int((bits == WHOLE).all()))
                words.append(bits)
            begins.append(len(found))
    most = int(np.diff(begins).max())
    tables: dict[str, Array] = {
        "block_begins": np.array(begins, np.int32),
        "block_places": np.array(found, np.int32),
        "block_bits": np.array(words, np.uint16),
    }
    return BlockMask(rows, blocks, len(found), most, masks, members), tables
