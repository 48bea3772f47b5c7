"""Rotary position embedding: of a head, and a kernel that does nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Kernel, Tensor, Work, define
from slmtvm.schedules.vector import Buffer, Expr


@dataclass(frozen=True)
class Rotation:
    """Which of a head's features are rotated, and in which pairs; as ``slm.rope`` has it."""

    head_dim: int
    rotary_dim: int
    interleaved: bool


def build_rope(
    m: int, num_heads: int, rotation: Rotation, table_rows: int, *, causal: bool
) -> Kernel:
    """(x, cos, sin) -> y float32 (m, num_heads * head_dim), for heads that nothing else rotates.

    The row of the tables is position + row, or row where not ``causal``. One block for each row.
    """
    d, half = rotation.head_dim, rotation.rotary_dim // 2
    width = num_heads * d
    tensors = (
        Tensor("x", (m, width), "float32"),
        Tensor("cos", (table_rows, half), "float32"),
        Tensor("sin", (table_rows, half), "float32"),
        Tensor("y", (m, width), "float32"),
    )

    def body(row: Expr, x: Buffer, cos: Buffer, sin: Buffer, y: Buffer, *scalars: Any) -> None:
        position = T.bind(scalars[0] + row) if causal else row
        with T.serial(0, num_heads) as head:
            at = T.bind(row * width + head * d)
            rotate_head(rotation, cos, sin, position, x, at, y, at)

    order = "interleaved" if rotation.interleaved else "halves"
    name = f"rope_{order}_m{m}_h{num_heads}x{d}_r{rotation.rotary_dim}_t{table_rows}"
    touched = {"cos": m * half * 4, "sin": m * half * 4}
    return define(
        name + ("" if causal else "_from0"), tensors, body, grid=m, outputs=["y"],
        scalars=["position"] if causal else [], work=Work(touched=touched),
    )  # fmt: skip


def rotate_head(
    rotation: Rotation,
    cos: Buffer | None,
    sin: Buffer | None,
    position: Expr,
    source: Buffer,
    source_at: Expr,
    target: Buffer,
    target_at: Expr,
) -> None:
    """One head of head_dim features from source to target, its first rotary_dim rotated."""
    half = rotation.rotary_dim // 2
    for at, lanes in vec.pieces(half):
        c = vec.load(cos, position * half + at, lanes)
        s = vec.load(sin, position * half + at, lanes)
        if rotation.interleaved:
            both = vec.load(source, source_at + 2 * at, 2 * lanes)
            a = vec.shuffle([both], range(0, 2 * lanes, 2))
            b = vec.shuffle([both], range(1, 2 * lanes, 2))
        else:
            a = vec.load(source, source_at + at, lanes)
            b = vec.load(source, source_at + half + at, lanes)
        turned_a = vec.fma(a, c, T.bind(-T.bind(b * s)))
        turned_b = vec.fma(b, c, T.bind(a * s))
        if rotation.interleaved:
            order = [i // 2 + (i % 2) * lanes for i in range(2 * lanes)]
            pairs = vec.shuffle([turned_a, turned_b], order)
            vec.store(target, target_at + 2 * at, pairs, 2 * lanes)
        else:
            vec.store(target, target_at + at, turned_a, lanes)
            vec.store(target, target_at + half + at, turned_b, lanes)
    for at, lanes in vec.pieces(rotation.head_dim - rotation.rotary_dim):
        rest = rotation.rotary_dim + at
        vec.store(target, target_at + rest, vec.load(source, source_at + rest, lanes), lanes)
