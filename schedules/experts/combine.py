"""The results of a token's experts, added up by its weights."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.vector import Buffer, Expr


def build_combine(m: int, top_k: int, d: int) -> Kernel:
    """(partial float32 (m * top_k, d), weights float32 (m, top_k)) -> y float32 (m, d).

    ``y[t] = sum_j weights[t, j] * partial[t * top_k + j]``, j from 0 up; one block for each row.
    Rows from ``valid`` on are zero, since no expert has computed them.
    """
    tensors = [
        Tensor("partial", (m * top_k, d), "float32"),
        Tensor("weights", (m, top_k), "float32"),
        Tensor("y", (m, d), "float32"),
    ]

    def body(row: Expr, partial: Buffer, weights: Buffer, y: Buffer, valid: Expr) -> None:
        def add_up(column: Expr, count: int, _slot: int) -> None:
            total = vec.splat(0.0)
            for j in range(top_k):
                weight = vec.splat(vec.load(weights, row * top_k + j, 1))
                part = vec.load_part(partial, (row * top_k + j) * d + column, count)
                total = vec.fma(weight, part, total)
            vec.store_part(y, row * d + column, total, count)

        def clear(column: Expr, count: int, _slot: int) -> None:
            vec.store_part(y, row * d + column, vec.splat(0.0), count)

        with T.If(row < valid):
            with T.Then():
                vec.sweep(d, add_up, 1)
            with T.Else():
                vec.sweep(d, clear, 1)

    name = f"combine_m{m}_k{top_k}_d{d}"
    return define(name, tensors, body, grid=m, outputs=["y"], scalars=["valid"])
