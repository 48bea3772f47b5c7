"""Rows of 8-bit activations turned, so that vectors hold the same k of several rows.

A word is ``Isa.k_step`` consecutive k of a row: what a block of weights meets. Those of all rows of
a row block lie together for each place in k. A step's rows are turned once for all layers.
"""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.isa.base import Buffer, Expr, let, load, splat
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.linear import by_row
from slmtvm.schedules.linear.rows_in_lanes import transposed
from slmtvm.schedules.linear.shape import LinearShape
from slmtvm.schedules.linear.tile import split

WORD = 4
"""Bytes of activations that a lane holds: ``k_step`` of the ISAs that have such kernels."""

_MOST_VECTORS = 8  # of a row block: as many sums of ``listed_blocks``, and registers beside them
_NEAR_BYTES = 64 * 1024  # of a row block's activations, that a list reads wherever it says
_TURNED = 16  # words of each row that a block turns


def lane_rows(m: int, k: int, isa: Isa) -> int:
    """Rows of a row block, whole vectors, of rows of ``k`` bytes."""
    near = max(1, _NEAR_BYTES // (isa.lanes * k))
    if isa.list_cost_of_turned is not None and near > 2:
        near -= near % 2  # tiles of two vectors fit row blocks
    return isa.lanes * min(_MOST_VECTORS, near, -(-m // isa.lanes))


def tensor(shape: LinearShape, isa: Isa) -> Tensor:
    """xt (row blocks, words of a row, lane_rows)."""
    rows = lane_rows(shape.m, shape.padded_k, isa)
    return Tensor("xt", (-(-shape.m // rows), shape.padded_k // WORD, rows), "int32")


def turning(shape: LinearShape, isa: Isa) -> Kernel:
    """xq as ``by_row`` has it -> xt as ``tensor`` says; rows beyond m are zeros."""
    m, k, lanes = shape.m, shape.padded_k, isa.lanes
    rows, words = lane_rows(m, k, isa), k // WORD
    parts = -(-words // _TURNED)
    dot = isa.rows_dot()

    def body(block: Expr, xq: Buffer, xt: Buffer) -> None:
        row_block, part = let(T.floordiv(block, parts)), let(T.floormod(block, parts))

        def turn(size: int) -> None:
            squares, rest = divmod(size, lanes)
            with T.serial(rows // lanes) as group:
                first_row = let(row_block * rows + group * lanes)
                to = let(row_block * words * rows + group * lanes)
                for square in range(squares + (rest > 0)):
                    begin = let(part * _TURNED + square * lanes)
                    count = lanes if square < squares else rest
                    columns = _columns(xq, first_row, begin, count)
                    for i, column in enumerate(columns):
                        at = T.ramp(to + (begin + i) * rows, 1, lanes)
                        T.buffer_store(xt, dot.turned(column), [at])

        split(words, _TURNED, part, turn)

    def _columns(xq: Buffer, first_row: Expr, begin: Expr, count: int) -> list[Expr]:
        """Words ``begin`` to ``begin + count`` of ``lanes`` rows, a vector for each."""
        staged = T.alloc_buffer((lanes * lanes,), "int32", scope="local")
        for i in range(lanes):
            row = let(first_row + i)

            def stage(row: Expr = row, i: int = i) -> None:
                raw = load(xq, row * k + begin * WORD, count * WORD)
                vector = T.reinterpret(f"int32x{count}", raw)
                T.buffer_store(staged, vector, [T.ramp(i * lanes, 1, count)])

            if m % rows == 0:
                stage()
                continue
            with T.If(row < m):
                with T.Then():
                    stage()
                with T.Else():
                    zero = splat(0, "int32", count)
                    T.buffer_store(staged, zero, [T.ramp(i * lanes, 1, count)])
        square = [let(load(staged, i * lanes, lanes)) for i in range(lanes)]
        return transposed(square, lanes)[:count]

    tensors = [by_row.activations(shape, isa)[0], tensor(shape, isa)]
    name = f"turn_rows_{isa.row_dtype}_{isa.name}_m{m}_k{k}"
    return define(name, tensors, body, grid=-(-m // rows) * parts, outputs=["xt"])
