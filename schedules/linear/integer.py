"""Exact integer sums of a tile: packed weights times quantized activations along k."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa.base import CHUNK, Buffer, Dot, Expr, Vectors, let, load, prefetch
from slmtvm.schedules.linear.tile import Registers, Tile


@dataclass(frozen=True)
class Operands:
    """Where a tile finds its operands: element offsets, counted from the first value of k.

    ``weight_at(vector)`` is the offset of a vector's packed weights, of which those of ``width``
    channels lie together for each step, ``row_at(row)`` that of a row of activations. ``bits`` is
    the size of a weight.
    ``sum_rows`` adds one column to the result: each row's activations summed. Where ``ahead`` is
    not 0, the weights that lie so many elements after those in use are prefetched. ``start`` holds
    the states that rows start from (see ``Dot.start``); the others start from zeros.
    """

    dot: Dot
    bits: int
    weights: Buffer
    width: int
    weight_at: Callable[[int], Expr]
    activations: Buffer
    row_at: Callable[[int], Expr]
    sum_rows: bool = False
    ahead: int = 0
    start: Mapping[int, Vectors] = field(default_factory=dict)


Sums = dict[tuple[int, int], Expr]


def integer_sums(tile: Tile, operands: Operands, k: int, unroll: int) -> Sums:
    """int32 sums over ``k`` (a multiple of CHUNK) for every (row, vector) of the tile.

    At most ``unroll`` values of k are unrolled, the rest is a loop. The column that
    ``operands.sum_rows`` asks for is number ``tile.vectors``.
    """
    columns = tile.vectors + operands.sum_rows
    cells = [(r, c) for r in range(tile.rows) for c in range(columns)]
    unroll = unrolled(k, unroll)
    dot = operands.dot
    started = {(r, c): [state] for r, state in operands.start.items() for c in range(tile.vectors)}
    if unroll == k:
        return _finished(dot, _accumulate(tile, operands, 0, k, started))
    lanes = tile.isa.lanes
    if dot.max_steps is not None:  # states overflow soon: carry the int32 sums instead
        totals = Registers("int32", lanes, len(cells))
        with T.serial(k // unroll) as part:
            sums = _finished(dot, _accumulate(tile, operands, part * unroll, unroll, {}))
            for index, cell in enumerate(cells):
                totals[index] = totals[index] + sums[cell]
        return {cell: totals[index] for index, cell in enumerate(cells)}
    width = len(dot.state)
    carried = Registers("int32", lanes, len(cells) * width)
    for cell, (state,) in started.items():
        for i, vector in enumerate(state):
            carried[cells.index(cell) * width + i] = vector

    def states() -> dict[tuple[int, int], list[Vectors]]:
        return {
            cell: [tuple(carried[index * width + i] for i in range(width))]
            for index, cell in enumerate(cells)
        }

    with T.serial(k // unroll) as part:
        after = _accumulate(tile, operands, part * unroll, unroll, states())
        for index, cell in enumerate(cells):
            for i, vector in enumerate(dot.settle(after[cell][0])):
                carried[index * width + i] = vector
    return _finished(dot, states())


def unrolled(k: int, unroll: int) -> int:
    """How many of ``k`` are unrolled where at most ``unroll`` are to be: the largest multiple of
    CHUNK that divides ``k``."""
    candidates = range(CHUNK, max(unroll, CHUNK) + 1, CHUNK)
    return max(size for size in candidates if k % size == 0)


def _accumulate(
    tile: Tile,
    operands: Operands,
    start: Expr,
    count: int,
    states: dict[tuple[int, int], list[Vectors]],
) -> dict[tuple[int, int], list[Vectors]]:
    """``count`` values of k from ``start`` added to the states, each cell's steps in order.

    A cell has several states where one would overflow.
    """
    isa, dot = tile.isa, operands.dot
    per_raw = 8 // operands.bits  # steps that one load of weights serves
    taken = 0
    for chunk in range(0, count, CHUNK):
        rows = [
            dot.row(operands.activations, operands.row_at(row) + start + chunk)
            for row in range(tile.rows)
        ]
        for k in range(0, CHUNK, per_raw * isa.k_step):
            offset = (start + chunk + k) * operands.width * operands.bits // 8
            fresh = [
                dot.max_steps is not None and (taken + i) % dot.max_steps == 0
                for i in range(per_raw)
            ]
            wanted = [
                [dot.activation(row, k + part * isa.k_step) for part in range(per_raw)]
                for row in rows
            ]
            for column in range(tile.vectors + operands.sum_rows):
                weights = _weights(tile, operands, offset, column, per_raw)
                for part in range(per_raw):
                    for row in range(tile.rows):
                        found = states.setdefault((row, column), [])
                        state = None if fresh[part] or not found else found.pop()
                        found.append(dot.step(state, weights[part], wanted[row][part]))
            if tile.rows > 1:
                for found in states.values():
                    found[-1] = isa.in_order(found[-1])
            taken += per_raw
    return states


def _weights(
    tile: Tile, operands: Operands, offset: Expr, column: int, per_raw: int
) -> tuple[Expr, ...]:
    """The operands of ``per_raw`` steps for one column of the sums."""
    if column == tile.vectors:
        return (operands.dot.ones(),) * per_raw
    at = operands.weight_at(column) + offset
    if operands.ahead and column % tile.isa.vectors == 0:
        prefetch(operands.weights, at + operands.ahead)
    return operands.dot.weights(load(operands.weights, at, tile.isa.raw_bytes))


def _finished(dot: Dot, states: dict[tuple[int, int], list[Vectors]]) -> Sums:
    sums = {}
    for cell, parts in states.items():
        total = dot.finish(parts[0])
        for part in parts[1:]:
            total = let(total + dot.finish(part))
        sums[cell] = total
    return sums
