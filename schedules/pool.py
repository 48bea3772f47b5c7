"""One row of all rows of a sequence: the first, the last, a mean, or the greatest of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.vector import LANES, Buffer, Expr

HOW = ("first", "last", "mean", "weightedmean", "max")
_MEANS = ("mean", "weightedmean")


@dataclass(frozen=True)
class PoolOp:
    """y float32 (1, d) of the first ``valid`` rows of x float32 (m, d).

    With ``mask_positions``, rows of which float32 (mask_positions,) ``limits`` are not above 0
    count for neither means nor max; with none of them visible a mean is no number. In a weighted
    mean row i weighs i + 1, counted over hidden ones too. A mean's sum goes from the first row to
    the last, so that it depends neither on m nor on how the grid is divided: its blocks are 16
    features each.
    """

    how: str
    m: int
    d: int
    mask_positions: int = 0

    def __post_init__(self) -> None:
        assert self.how in HOW, self.how
        assert not self.mask_positions or self.mask_positions >= self.m, self

    @property
    def reads_limits(self) -> bool:
        """Whether hidden rows make a difference."""
        return self.mask_positions > 0 and self.how in (*_MEANS, "max")

    @property
    def limits(self) -> tuple[Tensor, ...]:
        """The input that says which rows are hidden, where there is one."""
        return (Tensor("limits", (self.mask_positions,), "float32"),) if self.reads_limits else ()

    @property
    def name(self) -> str:
        """A name that says all that the code depends on."""
        masked = f"_p{self.mask_positions}" if self.reads_limits else ""
        return f"pool_{self.how}_m{self.m}_d{self.d}{masked}"


def build(op: PoolOp) -> Kernel:
    """(x, [limits]) -> y."""
    tensors = (
        Tensor("x", (op.m, op.d), "float32"),
        *op.limits,
        Tensor("y", (1, op.d), "float32"),
    )
    whole, rest = divmod(op.d, LANES)

    def body(block: Expr, x: Buffer, *arguments: Expr) -> None:
        *limits, y, valid = arguments
        column = T.bind(block * LANES)
        if not rest:
            _pool(op, x, limits, y, valid, column, LANES)
            return
        if whole:
            with T.If(block < whole), T.Then():
                _pool(op, x, limits, y, valid, column, LANES)
        with T.If(block == whole), T.Then():
            at = whole * LANES
            for offset, lanes in vec.pieces(rest):
                _pool(op, x, limits, y, valid, T.int32(at + offset), lanes)

    return define(op.name, tensors, body, grid=whole + (rest > 0), outputs=["y"], scalars=["valid"])


def _pool(
    op: PoolOp,
    x: Buffer,
    limits: list[Buffer],
    y: Buffer,
    valid: Expr,
    column: Expr,
    lanes: int,
) -> None:
    if op.how in ("first", "last"):
        row = T.int32(0) if op.how == "first" else T.bind(valid - 1)
        vec.store(y, column, vec.load(x, T.bind(row * op.d + column), lanes), lanes)
        return
    mean, weighted = op.how in _MEANS, op.how == "weightedmean"
    made = vec.Accumulators(1, 0.0 if mean else float(np.finfo(np.float32).min), lanes)
    count, place = vec.Accumulators(1, 0.0, 1), vec.Accumulators(1, 0.0, 1)
    with T.serial(0, valid) as row:
        value = vec.load(x, T.bind(row * op.d + column), lanes)
        shown = None if not limits else T.bind(vec.load(limits[0], row, 1) > T.float32(0))
        if mean:
            weight = T.float32(1)
            if weighted:
                place[0] = weight = T.bind(place[0] + weight)
                new = T.bind(vec.fma(value, vec.splat(weight, lanes), made[0]))
            else:
                new = T.bind(made[0] + value)
            if shown is not None:
                weight = T.Select(shown, weight, T.float32(0))
            count[0] = T.bind(count[0] + weight)
        else:
            new = T.bind(vec.maximum(made[0], value))
        made[0] = new if shown is None else T.bind(T.Select(_each(shown, lanes), new, made[0]))
    result = T.bind(made[0] / vec.splat(count[0], lanes)) if mean else made[0]
    vec.store(y, column, result, lanes)


def _each(shown: Expr, lanes: int) -> Expr:
    return shown if lanes == 1 else T.broadcast(shown, lanes)


def reference(op: PoolOp, inputs: Mapping[str, np.ndarray], valid: int) -> np.ndarray:
    """What the kernel means, exactly: y, float32 (1, d)."""
    x = inputs["x"][:valid]
    if op.how in ("first", "last"):
        return x[:1] if op.how == "first" else x[-1:]
    shown = x[inputs["limits"][:valid] > 0] if op.reads_limits else x
    if op.how == "max":
        return np.asarray(shown.max(axis=0, keepdims=True))
    weights = np.ones(valid, np.float32)
    if op.how == "weightedmean":
        weights = np.arange(1, valid + 1, dtype=np.float32)
    if op.reads_limits:
        weights = weights[inputs["limits"][:valid] > 0]
    total = np.zeros_like(x[:1])
    for row, weight in zip(shown, weights, strict=True):
        total = (total + row.astype(np.float64) * weight).astype(np.float32)  # rounded once
    return np.asarray(total / weights.sum(dtype=np.float32))
