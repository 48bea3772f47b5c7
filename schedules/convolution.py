"""Causal convolution of each channel alone, over this step's rows and those that came before.

The cache holds the convolution's input of every position, so that a session can go back; a step
reads the positions before its own from the cache, and its own from its input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Kernel, Tensor, Work, define
from slmtvm.schedules.vector import Expr


@dataclass(frozen=True)
class ConvShape:
    """m tokens of ``channels``; where ``gated`` a row of x is [b | c | v], as in ``short_conv``."""

    m: int
    channels: int
    taps: int
    capacity: int
    gated: bool = False
    has_bias: bool = False

    @property
    def cache(self) -> Tensor:
        """The input of each position."""
        return Tensor("cache", (self.capacity, self.channels), "float32")

    @property
    def tensors(self) -> list[Tensor]:
        """x, weight (taps, channels), [bias], cache, y."""
        width = self.channels * (3 if self.gated else 1)
        tensors = [
            Tensor("x", (self.m, width), "float32"),
            Tensor("weight", (self.taps, self.channels), "float32"),
        ]
        tensors += [Tensor("bias", (self.channels,), "float32")] * self.has_bias
        return [*tensors, self.cache, Tensor("y", (self.m, self.channels), "float32")]

    @property
    def name(self) -> str:
        """A name that says all that the code depends on."""
        parts = ["conv", *["gated"] * self.gated, *["bias"] * self.has_bias]
        return "_".join([*parts, f"m{self.m}_d{self.channels}_t{self.taps}_c{self.capacity}"])


def build(shape: ConvShape) -> Kernel:
    """The kernel of ``shape``; one block for each row.

    ``y[i] = fma(weight[taps - 1], v[i], ... fma(weight[0], v[i - taps + 1], bias))``, times c where
    gated; v before position 0 counts as zero. ``v[i]`` is stored at its position of the cache.
    """
    tensors, d = shape.tensors, shape.channels

    def body(row: Expr, *arguments: Any) -> None:
        named = dict(zip((t.name for t in tensors), arguments, strict=False))
        position = arguments[len(tensors)]
        x, cache, y = named["x"], named["cache"], named["y"]
        width = tensors[0].shape[1]

        def own(at_row: Expr, column: Expr, lanes: int) -> Expr:
            """v of a row of this step."""
            start = at_row * width + column
            if not shape.gated:
                return vec.load(x, start, lanes)
            return T.bind(vec.load(x, start, lanes) * vec.load(x, start + 2 * d, lanes))

        def add_tap(tap: int, value: Any) -> None:
            def emit(column: Expr, lanes: int) -> None:
                weight = vec.load(named["weight"], tap * d + column, lanes)
                total = vec.load(y, row * d + column, lanes)
                vec.store(
                    y, row * d + column, vec.fma(weight, value(column, lanes), total), lanes
                )  # fmt: skip

            _sweep(d, emit)

        def start(column: Expr, lanes: int) -> None:
            bias = named.get("bias")
            first = vec.splat(0.0, lanes) if bias is None else vec.load(bias, column, lanes)
            vec.store(y, row * d + column, first, lanes)

        _sweep(d, start)
        for tap in range(shape.taps):
            back = shape.taps - 1 - tap
            with T.If(row >= back):
                with T.Then():
                    there = T.bind(row - back)
                    add_tap(tap, lambda column, lanes, there=there: own(there, column, lanes))
                with T.Else(), T.If(position + row >= back), T.Then():
                    there = T.bind((position + row - back) * d)
                    add_tap(
                        tap,
                        lambda column, lanes, there=there: vec.load(cache, there + column, lanes),
                    )

        def finish(column: Expr, lanes: int) -> None:
            value = own(row, column, lanes)
            vec.store(cache, (position + row) * d + column, value, lanes)
            if shape.gated:
                gate = vec.load(x, row * width + d + column, lanes)
                total = vec.load(y, row * d + column, lanes)
                vec.store(y, row * d + column, T.bind(gate * total), lanes)

        _sweep(d, finish)

    row_bytes = shape.channels * 4
    return define(
        shape.name, tensors, body, grid=shape.m, outputs=["y"], state=["cache"],
        scalars=["position"],
        work=Work(
            multiply_adds=shape.m * shape.channels * shape.taps,
            touched={"cache": (shape.m + shape.taps - 1) * row_bytes},
        ),
    )  # fmt: skip


def _sweep(count: int, emit: Any) -> None:
    """``emit(column, lanes)`` for pieces that cover ``count`` columns."""

    def part(column: Expr, size: int, _slot: int) -> None:
        for at, lanes in vec.pieces(size):
            emit(column + at, lanes)

    vec.sweep(count, part)
