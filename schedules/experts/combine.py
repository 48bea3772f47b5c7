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
    for each point) -> y float32 (m, d). Where the sum itself is rounded, experts are added up in
    their order.
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

    own_points = tuple(p for p in points if p != TOTAL)

    def body(row: Expr, *arguments: Buffer) -> None:
        buffers = dict(zip(names, arguments, strict=False))
        valid = arguments[-1]

        def with_pair(total: Expr, pair: Expr, column: Expr, count: int) -> Expr:
            """``total`` and what the expert of ``pair`` gives."""
            at = Rounder(buffers, own_points, T.bind(buffers["experts"][pair]))
            weight = at(WEIGHT, vec.splat(vec.load(buffers["weights"], pair, 1)))
            part = at(DOWN, vec.load_part(buffers["partial"], pair * d + column, count))
            if WEIGHTED in points:
                return at.levels(WEIGHTED).round_onto(T.bind(weight * part), total)
            return vec.fma(weight, part, total)

        def add_up(column: Expr, count: int, _slot: int) -> None:
            total = vec.splat(0.0)
            for j in range(top_k):
                total = with_pair(total, T.bind(row * top_k + j), column, count)
            vec.store_part(buffers["y"], row * d + column, total, count)

        def clear(column: Expr, count: int, _slot: int) -> None:
            vec.store_part(buffers["y"], row * d + column, vec.splat(0.0), count)

        def add_up_all() -> None:
            """The sum is rounded before each expert, whether the token chose it or not."""
            pair_of = T.alloc_buffer((experts,), "int32", scope="local")  # -1: not chosen
            kept = T.alloc_buffer((LANES,), "float32", scope="local")
            with T.serial(0, experts) as expert:
                T.buffer_store(pair_of, T.int32(-1), [expert])
            with T.serial(0, top_k) as slot:
                pair = T.bind(row * top_k + slot)
                T.buffer_store(pair_of, pair, [T.bind(buffers["experts"][pair])])

            def emit(column: Expr, count: int, _slot: int) -> None:
                vec.store(kept, T.int32(0), vec.splat(0.0))
                with T.serial(0, experts) as expert:
                    before = vec.load(kept, T.int32(0))
                    vec.store(kept, T.int32(0), Rounder(buffers, (TOTAL,), expert)(TOTAL, before))
                    pair = T.bind(pair_of[expert])
                    with T.If(pair >= 0), T.Then():
                        total = with_pair(vec.load(kept, T.int32(0)), pair, column, count)
                        vec.store(kept, T.int32(0), total)
                y = vec.load(kept, T.int32(0))
                vec.store_part(buffers["y"], row * d + column, y, count)

            vec.sweep(d, emit, 1)

        with T.If(row < valid):
            with T.Then():
                if TOTAL in points:
                    add_up_all()
                else:
                    vec.sweep(d, add_up, 1)
            with T.Else():
                vec.sweep(d, clear, 1)

    name = "_".join(["combine", *points, f"m{m}_e{experts}_k{top_k}_d{d}"])
    return define(name, tensors, body, grid=m, outputs=["y"], scalars=["valid"])
