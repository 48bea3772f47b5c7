"""Each head of a row by a small matrix of floats: what a cache of lower rank keeps of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Kernel, Tensor, Work, define
from slmtvm.schedules.vector import Accumulators, Buffer, Expr

_UNROLL = 4  # features of a sum in one round of a loop
_SUMS = 4  # vectors of them at a time: with their operands they fit the registers of any ISA


@dataclass(frozen=True)
class HeadLinearShape:
    """m rows of num_heads heads, each of k features -> n; ``groups`` matrices, each for as many
    heads that follow each other."""

    m: int
    num_heads: int
    groups: int
    k: int
    n: int
    has_bias: bool = False

    def __post_init__(self) -> None:
        assert self.num_heads % self.groups == 0, self

    @property
    def name(self) -> str:
        bias = "_bias" if self.has_bias else ""
        return f"head_linear_m{self.m}_h{self.num_heads}x{self.groups}_k{self.k}_n{self.n}{bias}"


def project_heads(
    weight: Buffer,
    weight_at: Expr,
    size: tuple[int, int],
    source: Buffer,
    source_at: Expr,
    target: Buffer,
    target_at: Expr,
    *,
    count: int = 1,
    bias: tuple[Buffer, Expr] | None = None,
) -> None:
    """``count`` heads of k features, one after the other, times the matrix (k, n) of ``size`` at
    ``weight_at``, plus what lies at ``bias``: n features each."""
    k, n = size
    for head in range(0, count, _SUMS):
        heads = range(head, min(head + _SUMS, count))
        pieces = list(vec.pieces(n))
        width = _SUMS // len(heads)
        for first in range(0, len(pieces), width):
            parts = pieces[first : first + width]
            sums = [[Accumulators(1, lanes=lanes) for _, lanes in parts] for _ in heads]

            def add(
                feature: Expr, heads: range = heads, parts: Any = parts, sums: Any = sums
            ) -> None:
                line = T.bind(weight_at + feature * n)
                columns = [vec.load(weight, line + at, lanes) for at, lanes in parts]
                for i, own in zip(heads, sums, strict=True):
                    value = vec.load(source, source_at + i * k + feature, 1)
                    for (_, lanes), column, total in zip(parts, columns, own, strict=True):
                        total[0] = vec.fma(vec.splat(value, lanes), column, total[0])

            with T.serial(0, k // _UNROLL) as i:
                for u in range(_UNROLL):
                    add(T.bind(i * _UNROLL + u))
            for feature in range(k - k % _UNROLL, k):
                add(T.int32(feature))
            for i, own in zip(heads, sums, strict=True):
                for (at, lanes), total in zip(parts, own, strict=True):
                    made = total[0]
                    if bias is not None:
                        buffer, begin = bias
                        made = T.bind(made + vec.load(buffer, begin + (i * n + at), lanes))
                    vec.store(target, target_at + (i * n + at), made, lanes)


def build_head_linear(shape: HeadLinearShape) -> Kernel:
    """(x float32 (m, num_heads * k), weight float32 (groups, k, n), [bias (num_heads * n,)]) -> y
    float32 (m, num_heads * n).

    A sum goes over a head's features in order, and then comes the bias. One block for each group
    of each row.
    """
    k, n, heads = shape.k, shape.n, shape.num_heads
    members = heads // shape.groups
    tensors = [
        Tensor("x", (shape.m, heads * k), "float32"),
        Tensor("weight", (shape.groups, k, n), "float32"),
        *([Tensor("bias", (heads * n,), "float32")] if shape.has_bias else []),
        Tensor("y", (shape.m, heads * n), "float32"),
    ]

    def body(block: Expr, *arguments: Buffer) -> None:
        buffers = {t.name: a for t, a in zip(tensors, arguments, strict=True)}
        group, row = T.bind(block // shape.m), T.bind(block % shape.m)
        first = T.bind(group * members)
        x_at, y_at = T.bind((row * heads + first) * k), T.bind((row * heads + first) * n)
        weight_at, bias = T.bind(group * (k * n)), None
        if shape.has_bias:
            bias = (buffers["bias"], T.bind(first * n))
        project_heads(
            buffers["weight"], weight_at, (k, n), buffers["x"], x_at, buffers["y"], y_at,
            count=members, bias=bias,
        )  # fmt: skip

    return define(
        shape.name, tensors, body, grid=shape.groups * shape.m, outputs=["y"],
        work=Work(multiply_adds=shape.m * heads * k * n),
    )  # fmt: skip
