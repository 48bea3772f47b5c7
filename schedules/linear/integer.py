"""Exact integer sums of a tile: packed weights times quantized activations along k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa.base import PANEL, Buffer, Dot, Expr, Vectors, let, load
from slmtvm.schedules.linear.tile import Registers, Tile

CHUNK = 16
"""Values of k whose activations are loaded together."""


@dataclass(frozen=True)
class Operands:
    """Where a tile finds its operands: element offsets, counted from the first value of k.

    ``weight_at(vector)`` is the offset of the panel of packed weights a vector belongs to,
    ``row_at(row)`` that of a row of activations. ``bits`` is the size of a weight.
    ``sum_rows`` adds one column to the result: each row's activations summed.
    """

    dot: Dot
    bits: int
    weights: Buffer
    weight_at: Callable[[int], Expr]
    activations: Buffer
    row_at: Callable[[int], Expr]
    sum_rows: bool = False


Sums = dict[tuple[int, int], Expr]


def integer_sums(tile: Tile, operands: Operands, k: int, unroll: int) -> Sums:
    """int32 sums over ``k`` (a multiple of CHUNK) for every (row, vector) of the tile.

    At most ``unroll`` values of k are unrolled, the rest is a loop. The column that
    ``operands.sum_rows`` asks for is number ``tile.vectors``.
    """
    columns = tile.vectors + operands.sum_rows
    cells = [(r, c) for r in range(tile.rows) for c in range(columns)]
    unroll = _divisor(k, unroll)
    dot = operands.dot
    if unroll == k:
        return _finished(dot, _accumulate(tile, operands, cells, 0, k, {}))
    lanes = tile.isa.lanes
    if dot.max_steps is not None:  # states overflow soon: carry the int32 sums instead
        totals = Registers("int32", lanes, len(cells))
        with T.serial(k // unroll) as part:
            sums = _finished(dot, _accumulate(tile, operands, cells, part * unroll, unroll, {}))
            for index, cell in enumerate(cells):
                totals[index] = totals[index] + sums[cell]
        return {cell: totals[index] for index, cell in enumerate(cells)}
    width = len(dot.state)
    carried = Registers("int32", lanes, len(cells) * width)

    def states() -> dict[tuple[int, int], list[Vectors]]:
        return {
            cell: [tuple(carried[index * width + i] for i in range(width))]
            for index, cell in enumerate(cells)
        }

    with T.serial(k // unroll) as part:
        after = _accumulate(tile, operands, cells, part * unroll, unroll, states())
        for index, cell in enumerate(cells):
            for i, vector in enumerate(after[cell][0]):
                carried[index * width + i] = vector
    return _finished(dot, states())


def _divisor(k: int, unroll: int) -> int:
    """The largest multiple of CHUNK that divides ``k`` and is at most ``unroll``."""
    candidates = range(CHUNK, max(unroll, CHUNK) + 1, CHUNK)
    return max(size for size in candidates if k % size == 0)


def _accumulate(
    tile: Tile,
    operands: Operands,
    cells: list[tuple[int, int]],
    start: Expr,
    count: int,
    states: dict[tuple[int, int], list[Vectors]],
) -> dict[tuple[int, int], list[Vectors]]:
    """``count`` values of k from ``start`` added to the states, each cell's steps in order.

    A cell has several states where one would overflow.
    """
    isa, dot = tile.isa, operands.dot
    limit = dot.max_steps
    taken = 0
    for k in range(0, count, CHUNK):
        rows = [
            dot.activations(operands.activations, operands.row_at(row) + start + k, CHUNK)
            for row in range(tile.rows)
        ]
        steps = CHUNK // isa.k_step
        per_raw = 8 // operands.bits
        for first in range(0, steps, per_raw):
            at = (start + k + first * isa.k_step) * PANEL * operands.bits // 8
            weights: list[tuple[Expr, ...]] = []
            for vector in range(tile.vectors):
                lane = operands.weight_at(vector) + at + tile.lane(vector) * isa.k_step
                weights.append(dot.weights(load(operands.weights, lane, isa.raw_bytes)))
            if operands.sum_rows:
                weights.append((dot.ones(),) * per_raw)
            for part in range(per_raw):
                fresh = limit is not None and taken % limit == 0
                for row, column in cells:
                    found = states.setdefault((row, column), [])
                    state = None if fresh or not found else found.pop()
                    found.append(dot.step(state, weights[column][part], rows[row][first + part]))
                taken += 1
    return states


def _finished(dot: Dot, states: dict[tuple[int, int], list[Vectors]]) -> Sums:
    sums = {}
    for cell, parts in states.items():
        total = dot.finish(parts[0])
        for part in parts[1:]:
            total = let(total + dot.finish(part))
        sums[cell] = total
    return sums
