"""The gates of pairs' rows, and what goes into their first layer, with each expert's roundings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.experts.points import HIDDEN, INPUT, POINTS
from slmtvm.schedules.experts.rounding import Rounder, table
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.rows.prologue import FUNCTIONS
from slmtvm.schedules.vector import LANES, Buffer, Expr

_GATED = "swiglu"


@dataclass(frozen=True)
class RoutedRowOp:
    """``slm.routed_row`` of m tokens; d features in a pair's result.

    ``points`` are those of ``points`` that have a table. ``storage``: "" where the
    result is float32; else "uint8", or "int8" for 128 less, of what the last rounding makes.
    """

    m: int
    top_k: int
    experts: int
    d: int
    activation: str
    points: tuple[str, ...]
    by_pair: bool
    storage: str = ""
    k_multiple: int = LANES  # columns of quantized rows are a multiple of it

    def __post_init__(self) -> None:
        assert self.activation in (_GATED, "identity", *FUNCTIONS), self
        assert set(self.points) <= set(POINTS), self
        assert not self.storage or self.last in self.points, self
        assert self.k_multiple % LANES == 0, self

    @property
    def last(self) -> str:
        """The point of the result."""
        return INPUT if INPUT in self.points else HIDDEN

    @property
    def pairs(self) -> int:
        return self.m * self.top_k

    @property
    def k_padded(self) -> int:
        """Columns of quantized rows."""
        return -(-self.d // self.k_multiple) * self.k_multiple

    @property
    def name(self) -> str:
        """A name that says all that the code depends on."""
        rows = "pairs" if self.by_pair else "tokens"
        parts = ["routed_row", self.activation, rows, *self.points]
        if self.storage:
            parts.append(f"{self.storage}_k{self.k_padded}")
        return "_".join([*parts, f"m{self.m}_e{self.experts}_t{self.top_k}_d{self.d}"])

    @property
    def inputs(self) -> list[Tensor]:
        width = 2 * self.d if self.activation == _GATED else self.d
        return [
            Tensor("x", (self.pairs if self.by_pair else self.m, width), "float32"),
            Tensor("experts", (self.m, self.top_k), "int32"),
            *(table(point, self.experts) for point in self.points),
        ]

    @property
    def outputs(self) -> list[Tensor]:
        """y float32 (pairs, d), or rows that linear layers take as "row_u8"."""
        if not self.storage:
            return [Tensor("y", (self.pairs, self.d), "float32")]
        return [
            Tensor("xq", (self.pairs, self.k_padded), self.storage),
            Tensor("xs", (self.pairs,), "float32"),
            Tensor("xz", (self.pairs,), "int32"),
        ]


def build_row(op: RoutedRowOp) -> Kernel:
    """The kernel of ``op``: tensors op.inputs, op.outputs; a block is a pair."""
    tensors = [*op.inputs, *op.outputs]

    def body(pair: Expr, *arguments: Buffer) -> None:
        buffers = dict(zip((t.name for t in tensors), arguments, strict=True))
        at = Rounder(buffers, op.points, T.bind(buffers["experts"][pair]))
        row = pair if op.by_pair else T.bind(T.floordiv(pair, op.top_k))
        value = _values(op, row, buffers["x"], at)
        if op.storage:
            _store_levels(op, pair, buffers, value, at)
            return

        def emit(column: Expr, count: int, _slot: int) -> None:
            y = at(op.last, value(column, count))
            vec.store_part(buffers["y"], pair * op.d + column, y, count)

        vec.sweep(op.d, emit, 1)

    return define(op.name, tensors, body, grid=op.pairs, outputs=[t.name for t in op.outputs])


def _values(
    op: RoutedRowOp, row: Expr, x: Buffer, at: Rounder
) -> Callable[[Expr, int], Expr]:  # fmt: skip
    """16 values of the result from a column on, lanes from a count on zero, before its rounding."""

    def silu(g: Expr) -> Expr:
        return T.bind(g * at("sigmoid", vec.sigmoid(g)))

    def value(column: Expr, count: int) -> Expr:
        if op.activation == _GATED:
            start = T.bind(row * (2 * op.d) + column)
            gate, up = (vec.load_part(x, start + i * op.d, count) for i in range(2))
            activated = at("activation", silu(at("gate", gate)))
            return T.bind(activated * at("up", up))
        given = at("up", vec.load_part(x, row * op.d + column, count))
        if op.activation == "identity":
            return given
        return silu(given) if op.activation == "silu" else FUNCTIONS[op.activation](given)

    return value


def _store_levels(
    op: RoutedRowOp,
    pair: Expr,
    buffers: dict[str, Buffer],
    value: Callable[[Expr, int], Expr],
    at: Rounder,
) -> None:
    levels = at.levels(op.last)
    low = T.bind(T.cast(levels.low, "int32"))
    vec.store(buffers["xz"], pair, T.bind(T.int32(0) - low), 1)
    bias = vec.splat(T.bind(low + T.int32(128 if op.storage == "int8" else 0)))

    def store(column: Expr, q: Expr) -> None:
        stored = T.cast(T.bind(q - bias), f"{op.storage}x{LANES}")
        vec.store(buffers["xq"], pair * op.k_padded + column, stored)

    watch = vec.NotANumber(1)

    def emit(column: Expr, count: int, slot: int) -> None:
        v = value(column, count)
        watch.look(v, slot)
        store(column, levels.of(v))

    vec.sweep(op.d, emit, 1)
    # A row that holds what is no number has that for its scale.
    vec.store(buffers["xs"], pair, watch.or_else(levels.scale), 1)
    for column in range(-(-op.d // LANES) * LANES, op.k_padded, LANES):
        store(T.int32(column), vec.splat_int(0))
