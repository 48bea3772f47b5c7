"""Default knobs: the tile that an ISA's registers suggest.

Bigger tiles load and unpack less for each product; tiles that do not fit the registers spill, which
costs more than that saves. About half the registers hold sums, the rest operands.
"""

from __future__ import annotations

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.linear.shape import LinearShape

Knobs = dict[str, int]
KnobSpace = dict[str, tuple[int, ...]]

BY_TILE = 1
"""As ``pf``: prefetch the next tile's weights. 0 prefetches nothing, more counts bytes."""

_FEW_ROWS = 4
"""Up to so many, a product waits for its weights: later ones are asked for in time."""


def tile_knobs(shape: LinearShape, isa: Isa, registers_per_cell: int, max_rows: int) -> Knobs:
    """``mr`` and ``nv`` for a kernel whose (row, vector) cells take so many registers each.

    For one row: whole panels, whose memory is read in order, and more of them where the layer is
    large enough. For more: as many rows as fit, a divisor of m if there is one of useful size.
    """
    if shape.m == 1:
        fitting = isa.registers // 4 // registers_per_cell
        sharing = shape.n // isa.least_blocks // isa.lanes
        return {"mr": 1, "nv": max(isa.vectors, _power_of_two(min(4, fitting, sharing)))}
    cells = max(1, isa.registers // 2 // registers_per_cell)
    rows = _rows(shape.m, min(max_rows, cells))
    return {"mr": rows, "nv": min(4, _power_of_two(cells // rows))}


def prefetches(shape: LinearShape, isa: Isa) -> bool:
    """Whether the next tile's weights are prefetched."""
    return isa.prefetch and shape.m <= _FEW_ROWS


def row_knobs(rows: int, registers: int) -> int:
    """``mr`` where a row takes one of so many registers."""
    return _rows(rows, min(8, max(registers, 1)))


def tile_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    """Settings of ``mr``, ``nv`` and ``pf`` that can be worth a try."""
    vectors = tuple(nv for nv in (1, 2, 4, 8) if nv * isa.lanes <= 4 * isa.panel)
    if shape.m == 1:
        return {"mr": (1,), "nv": vectors, "pf": (0, BY_TILE, 512, 1024, 2048, 4096)}
    # More would leave no registers for a second row.
    few = tuple(nv for nv in vectors if nv <= max(isa.registers // 4, isa.vectors))
    return {"mr": (1, 2, 3, 4, 6, 8), "nv": few, "pf": (0, BY_TILE, 1024)}


def ahead(knobs: Knobs, tile_elements: int, element_bytes: int) -> int:
    """How many elements ahead of those in use weights are prefetched; 0 for not at all.

    ``tile_elements``: from a tile to the next.
    """
    distance = knobs["pf"]
    return tile_elements if distance == BY_TILE else distance // element_bytes


def _rows(m: int, most: int) -> int:
    """The largest divisor of m that is at most ``most`` and more than half of it, else ``most``."""
    divisors = [rows for rows in range(most // 2 + 1, most + 1) if m % rows == 0]
    return min(m, max(divisors, default=most))


def _power_of_two(count: int) -> int:
    """The largest power of two up to ``count``; 1 for less."""
    return 1 << max(count, 1).bit_length() - 1
