"""Sums and products of rows: of activations, and of an activation and rows of a position table."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Kernel, Tensor, Work, define
from slmtvm.schedules.vector import Buffer, Expr


def build_add(m: int, d: int) -> Kernel:
    """(a, b) -> y = a + b, all float32 (m, d); one block for each row."""
    tensors = [Tensor(name, (m, d), "float32") for name in ("a", "b", "y")]

    def body(row: Expr, a: Buffer, b: Buffer, y: Buffer) -> None:
        _each(d, _reader(a, row * d), _reader(b, row * d), vec.add, y, row * d)

    return define(f"add_m{m}_d{d}", tensors, body, grid=m, outputs=["y"])


def build_multiply(m: int, d: int, by: int) -> Kernel:
    """(a, b) -> y = a * b; a and y float32 (m, d), b (m, by), where by is d, or 1 for one factor of
    each row; one block for each row."""
    assert by in (1, d), (by, d)
    tensors = [Tensor(n, (m, by if n == "b" else d), "float32") for n in ("a", "b", "y")]

    def body(row: Expr, a: Buffer, b: Buffer, y: Buffer) -> None:
        factors = _reader(b, row * d)
        if by == 1:
            factor = vec.load(b, row, 1)
            factors = lambda at, lanes: vec.splat(factor, lanes)  # noqa: E731
        _each(d, _reader(a, row * d), factors, lambda x, f: T.bind(x * f), y, row * d)

    return define(f"multiply_m{m}_d{d}_by{by}", tensors, body, grid=m, outputs=["y"])


def build_position_rows(m: int, d: int, table_rows: int) -> Kernel:
    """table float32 (table_rows, d) -> y = table[position .. position + m]; one block a row."""
    tensors = [Tensor("table", (table_rows, d), "float32"), Tensor("y", (m, d), "float32")]

    def body(row: Expr, table: Buffer, y: Buffer, position: Expr) -> None:
        start = T.bind((position + row) * d)

        def emit(column: Expr, count: int, _slot: int) -> None:
            for at, lanes in vec.pieces(count):
                here = column + at
                vec.store(y, row * d + here, vec.load(table, start + here, lanes), lanes)

        vec.sweep(d, emit)

    return define(
        f"position_rows_m{m}_d{d}_r{table_rows}", tensors, body, grid=m, outputs=["y"],
        scalars=["position"], work=Work(touched={"table": m * d * 4}),
    )  # fmt: skip


def build_segments(m: int, capacity: int) -> Kernel:
    """segments int32 (capacity,) -> y int32 (m,), those from the position on; one block."""
    tensors = [Tensor("segments", (capacity,), "int32"), Tensor("y", (m,), "int32")]

    def body(_block: Expr, segments: Buffer, y: Buffer, position: Expr) -> None:
        with T.serial(0, m) as row:
            T.buffer_store(y, segments[position + row], [row])

    return define(
        f"segments_m{m}_r{capacity}", tensors, body, grid=1, outputs=["y"], scalars=["position"]
    )


def build_earlier(m: int, first: int | None) -> Kernel:
    """tokens int32 (m,) -> y int32 (m,): each the token before it, and at the beginning ``first``,
    or where that is None the last valid one; one block."""
    tensors = [Tensor("tokens", (m,), "int32"), Tensor("y", (m,), "int32")]

    def body(_block: Expr, tokens: Buffer, y: Buffer, *scalars: Expr) -> None:
        T.buffer_store(y, T.int32(first) if first is not None else tokens[scalars[0] - 1], [0])
        with T.serial(1, m) as row:
            T.buffer_store(y, tokens[row - 1], [row])

    label = "last" if first is None else first
    return define(
        f"earlier_m{m}_first_{label}", tensors, body, grid=1, outputs=["y"],
        scalars=["valid"] if first is None else [],
    )  # fmt: skip


def build_add_positions(m: int, d: int, table_rows: int) -> Kernel:
    """(x, table) -> y = x + table[position .. position + m]; x, y float32 (m, d), table
    (table_rows, d); one block for each row."""
    tensors = [
        Tensor("x", (m, d), "float32"),
        Tensor("table", (table_rows, d), "float32"),
        Tensor("y", (m, d), "float32"),
    ]

    def body(row: Expr, x: Buffer, table: Buffer, y: Buffer, position: Expr) -> None:
        rows = _reader(table, T.bind((position + row) * d))
        _each(d, _reader(x, row * d), rows, vec.add, y, row * d)

    return define(
        f"add_positions_m{m}_d{d}_r{table_rows}", tensors, body, grid=m, outputs=["y"],
        work=Work(touched={"table": m * d * 4}), scalars=["position"],
    )  # fmt: skip


_Read = Callable[[Expr, int], Expr]
"""The elements of a row from a column on, so many lanes of them."""


def _reader(buffer: Buffer, start: Expr) -> _Read:
    return lambda at, lanes: vec.load(buffer, start + at, lanes)


def _each(
    d: int, a: _Read, b: _Read, function: Callable[[Expr, Expr], Expr], y: Buffer, y_at: Expr
) -> None:
    def emit(column: Expr, count: int, _slot: int) -> None:
        for at, lanes in vec.pieces(count):
            here = column + at
            vec.store(y, y_at + here, function(a(here, lanes), b(here, lanes)), lanes)

    vec.sweep(d, emit)
