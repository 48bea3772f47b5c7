"""Rows of 8-bit activations turned byte by byte: vectors hold one k of several rows.

A row block is ROWS rows, so that a k of it is a line of a cache. Of each 32 rows, the bytes of row
8 v + 4 h + i lie at 16 h + 4 v + i: where x86 unpacks two such vectors to words, and words to
int32, within halves of 16 bytes, vector v has its rows in order. A step's rows are turned once for
all layers.
"""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.isa.base import Buffer, Expr, let, load, splat
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.linear import by_row
from slmtvm.schedules.linear.shape import ROW_ALIGNMENT, LinearShape

ROWS = 64
"""Of a row block."""

VECTOR = 32
"""Rows of a vector of bytes."""

_HALF = 16
_SQUARES = 4  # of ROW_ALIGNMENT k, that a block turns: a line of a row


def lane_rows(m: int) -> int:
    """Rows of a row block that are turned, whole vectors."""
    return min(ROWS, -(-m // VECTOR) * VECTOR)


def tensor(shape: LinearShape) -> Tensor:
    """xt uint8 (row blocks, padded_k, ROWS); with ``VECTOR`` rows at most, half of it is not
    used."""
    return Tensor("xt", (-(-shape.m // ROWS), shape.padded_k, ROWS), "uint8")


def dealt(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Two vectors of bytes dealt into each other, half by half: low bytes of halves, and high."""
    low = [h + i // 2 + i % 2 * VECTOR for h in range(0, VECTOR, _HALF) for i in range(_HALF)]
    high = [i + _HALF // 2 for i in low]
    return let(T.Shuffle([a, b], low)), let(T.Shuffle([a, b], high))


def _transposed(vectors: list[Expr]) -> list[Expr]:
    """``_HALF`` vectors, the rows of a matrix in each half -> its columns: as often as they can be
    halved, those of both halves are dealt into each other."""
    half, count = len(vectors) // 2, len(vectors)
    while count > 1:
        both = zip(vectors[:half], vectors[half:], strict=True)
        vectors = [vector for a, b in both for vector in dealt(a, b)]
        count //= 2
    return vectors


def turning(shape: LinearShape, isa: Isa) -> Kernel:
    """xq as ``by_row`` has it, of bytes without a sign -> xt as ``tensor`` says; rows beyond m are
    zeros."""
    m, k = shape.m, shape.padded_k
    squares = k // ROW_ALIGNMENT
    parts = -(-squares // _SQUARES)

    def body(block: Expr, xq: Buffer, xt: Buffer) -> None:
        row_block, part = let(T.floordiv(block, parts)), let(T.floormod(block, parts))
        count = let(T.min(_SQUARES, squares - part * _SQUARES))
        with T.serial(count) as square:
            first = let((part * _SQUARES + square) * ROW_ALIGNMENT)
            with T.serial(lane_rows(m) // VECTOR) as group:
                row = let(row_block * ROWS + group * VECTOR)
                turned = _transposed(_rows(xq, row, first))
                to = let((row_block * k + first) * ROWS + group * VECTOR)
                for i, vector in enumerate(turned):
                    T.buffer_store(xt, vector, [T.ramp(to + i * ROWS, 1, VECTOR)])

    def _rows(xq: Buffer, first_row: Expr, at: Expr) -> list[Expr]:
        """ROW_ALIGNMENT bytes of each of VECTOR rows, those of two rows in each vector."""
        lower = [let(first_row + 8 * (i // 4) + i % 4) for i in range(_HALF)]
        if m % VECTOR == 0:
            halves = [
                [load(xq, (row + h) * k + at, _HALF) for h in (0, 4)] for row in lower
            ]  # fmt: skip
            return [let(T.Shuffle(pair, list(range(VECTOR)))) for pair in halves]
        staged = T.alloc_buffer((VECTOR * _HALF,), "uint8", scope="local")
        for i, row in enumerate(lower):
            for h in (0, 1):
                to = T.ramp((2 * i + h) * _HALF, 1, _HALF)
                with T.If(row + 4 * h < m):
                    with T.Then():
                        T.buffer_store(staged, load(xq, (row + 4 * h) * k + at, _HALF), [to])
                    with T.Else():
                        T.buffer_store(staged, splat(0, "uint8", _HALF), [to])
        return [let(load(staged, i * VECTOR, VECTOR)) for i in range(_HALF)]

    tensors = [by_row.activations(shape, isa)[0], tensor(shape)]
    name = f"turn_bytes_{isa.name}_m{m}_k{k}"
    return define(name, tensors, body, grid=-(-m // ROWS) * parts, outputs=["xt"])
