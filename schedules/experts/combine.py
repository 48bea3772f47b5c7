"""The results of a token's experts, added up by its weights."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.experts.points import DOWN, OF_SUM, TOTAL, WEIGHT, WEIGHTED
from slmtvm.schedules.experts.rounding import Rounder, table
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.vector import LANES, Buffer, Expr


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


def build_rounded_combine(
    m: int, top_k: int, d: int, experts: int, points: tuple[str, ...]
) -> Kernel:
    """As ``build_combine``, with ``points`` of OF_SUM rounded as the tables of the experts have it.

    (partial float32 (m * top_k, d), weights float32 (m, top_k), experts int32 (m, top_k), a table
    for each point) -> y float32 (m, d). Experts are added up in their order.
    """
    assert set(points) <= set(OF_SUM), points
    tensors = [
        Tensor("partial", (m * top_k, d), "float32"),
        Tensor("weights", (m, top_k), "float32"),
        Tensor("experts", (m, top_k), "int32"),
        *(table(point, experts) for point in points),
        Tensor("y", (m, d), "float32"),
    ]
    names = [t.name for t in tensors]

    def body(row: Expr, *arguments: Buffer) -> None:
        buffers = dict(zip(names, arguments, strict=False))
        valid = arguments[-1]
        # The pair of each expert; -1 for those that the token has not chosen.
        pair_of = T.alloc_buffer((experts,), "int32", scope="local")
        total = T.alloc_buffer((LANES,), "float32", scope="local")
        with T.serial(0, experts) as expert:
            T.buffer_store(pair_of, T.int32(-1), [expert])
        with T.serial(0, top_k) as slot:
            pair = T.bind(row * top_k + slot)
            T.buffer_store(pair_of, pair, [T.bind(buffers["experts"][pair])])

        def add_up(column: Expr, count: int, _slot: int) -> None:
            vec.store(total, T.int32(0), vec.splat(0.0))
            with T.serial(0, experts) as expert:
                if TOTAL in points:
                    before = Rounder(buffers, (TOTAL,), expert)
                    vec.store(total, T.int32(0), before(TOTAL, vec.load(total, T.int32(0))))
                pair = T.bind(pair_of[expert])
                with T.If(pair >= 0), T.Then():
                    at = Rounder(buffers, tuple(p for p in points if p != TOTAL), expert)
                    weight = at(WEIGHT, vec.splat(vec.load(buffers["weights"], pair, 1)))
                    part = vec.load_part(buffers["partial"], pair * d + column, count)
                    part, so_far = at(DOWN, part), vec.load(total, T.int32(0))
                    if WEIGHTED in points:
                        sum_of_both = at.levels(WEIGHTED).round_onto(T.bind(weight * part), so_far)
                    else:
                        sum_of_both = vec.fma(weight, part, so_far)
                    vec.store(total, T.int32(0), sum_of_both)
            y = vec.load(total, T.int32(0))
            vec.store_part(buffers["y"], row * d + column, y, count)

        def clear(column: Expr, count: int, _slot: int) -> None:
            vec.store_part(buffers["y"], row * d + column, vec.splat(0.0), count)

        with T.If(row < valid):
            with T.Then():
                vec.sweep(d, add_up, 1)
            with T.Else():
                vec.sweep(d, clear, 1)

    name = "_".join(["combine", *points, f"m{m}_e{experts}_k{top_k}_d{d}"])
    return define(name, tensors, body, grid=m, outputs=["y"], scalars=["valid"])
