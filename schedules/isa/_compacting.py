"""What kernels on columns of blocks ask of an ISA: values put together by a mask, and strides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

Expr = Any  # a TIR expression
Buffer = Any


class Compacting(ABC):
    """Vectors whose length is any multiple of 16 lanes, of which a mask keeps some."""

    sum_lanes: int
    """Of an int32 vector whose first lane is a sum of lanes."""

    @abstractmethod
    def together(self, values: Expr, words: Expr) -> Expr:
        """The lanes of ``values`` (8 or 16 bits each) whose bit of ``words`` (a uint16 for each 16
        of them, the first in the lowest bit) is set, from the first lane on; zeros behind them."""

    @abstractmethod
    def load_apart(self, buffer: Buffer, at: Expr, stride: int, count: Expr) -> Expr:
        """A vector of ``Isa.lanes`` bytes, from ``at`` on each ``stride`` bytes behind the one
        before it; those from ``count`` on are not read, and 0."""

    @abstractmethod
    def store_apart(self, buffer: Buffer, at: Expr, stride: int, value: Expr) -> None:
        """``value``, ``Isa.lanes`` of int32, each ``stride`` elements behind the one before it."""

    @abstractmethod
    def add_lanes(self, total: Expr, values: Expr) -> Expr:
        """A vector of ``sum_lanes`` whose first lane is that of ``total`` plus all lanes of int16
        ``values``."""

    @abstractmethod
    def first(self, total: Expr) -> Expr:
        """The first lane of a vector of ``sum_lanes``."""
