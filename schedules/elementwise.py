"""Sums of rows: of two activations, and of an activation and the rows of a position table."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Kernel, Tensor, Work, define
from slmtvm.schedules.vector import Buffer, Expr


def build_add(m: int, d: int) -> Kernel:
    """(a, b) -> y = a + b, all float32 (m, d); one block for each row."""
    tensors = [Tensor(name, (m, d), "float32") for name in ("a", "b", "y")]

    def body(row: Expr, a: Buffer, b: Buffer, y: Buffer) -> None:
        _add_row(d, a, row * d, b, row * d, y, row * d)

    return define(f"add_m{m}_d{d}", tensors, body, grid=m, outputs=["y"])


def build_add_positions(m: int, d: int, table_rows: int) -> Kernel:
    """(x, table) -> y = x + table[position .. position + m]; x, y float32 (m, d), table
    (table_rows, d); one block for each row."""
    tensors = [
        Tensor("x", (m, d), "float32"),
        Tensor("table", (table_rows, d), "float32"),
        Tensor("y", (m, d), "float32"),
    ]

    def body(row: Expr, x: Buffer, table: Buffer, y: Buffer, position: Expr) -> None:
        _add_row(d, x, row * d, table, T.bind((position + row) * d), y, row * d)

    return define(
        f"add_positions_m{m}_d{d}", tensors, body, grid=m, outputs=["y"], scalars=["position"],
        work=Work(touched={"table": m * d * 4}),
    )  # fmt: skip


def _add_row(d: int, a: Buffer, a_at: Expr, b: Buffer, b_at: Expr, y: Buffer, y_at: Expr) -> None:
    def emit(column: Expr, count: int, _slot: int) -> None:
        for at, lanes in vec.pieces(count):
            here = column + at
            total = vec.load(a, a_at + here, lanes) + vec.load(b, b_at + here, lanes)
            vec.store(y, y_at + here, total, lanes)

    vec.sweep(d, emit)
