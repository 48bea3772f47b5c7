"""Roundings with a scale and ends of each expert's own, read from memory by the kernels."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.vector import Buffer, Expr

_COLUMNS = 3  # of a table: scale, lowest and highest level


def table(point: str, experts: int) -> Tensor:
    """What a kernel takes for a point of ``points``: float32 (experts, 3)."""
    return Tensor(f"{point}_rounding", (experts, _COLUMNS), "float32")


@dataclass(frozen=True)
class Levels:
    """How one expert's values are rounded: float32 scalars."""

    scale: Expr
    low: Expr
    high: Expr

    @staticmethod
    def load(buffer: Buffer, expert: Expr) -> Levels:
        first = T.bind(expert * _COLUMNS)
        return Levels(*(T.bind(vec.load(buffer, first + i, 1)) for i in range(_COLUMNS)))

    def of(self, x: Expr) -> Expr:
        """The level of each lane of x, int32."""
        return vec.levels(x, self.scale, self.low, self.high)

    def round(self, x: Expr) -> Expr:
        """Each lane of x rounded."""
        return vec.rounded(x, self.scale, self.low, self.high)

    def round_onto(self, x: Expr, addend: Expr) -> Expr:
        """``round`` plus the addend."""
        return vec.rounded_onto(x, self.scale, self.low, self.high, addend)


class Rounder:
    """Rounds the values of one expert at those points that have a table among ``buffers``."""

    def __init__(self, buffers: dict[str, Buffer], points: tuple[str, ...], expert: Expr) -> None:
        self._levels = {p: Levels.load(buffers[f"{p}_rounding"], expert) for p in points}

    def __call__(self, point: str, x: Expr) -> Expr:
        levels = self._levels.get(point)
        return x if levels is None else levels.round(x)

    def levels(self, point: str) -> Levels:
        return self._levels[point]
