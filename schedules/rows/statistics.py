"""What a norm has to know of a whole row: means of something over its features."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.vector import Accumulators, Expr

_CHAINS = 4  # independent sums, to hide the latency of fma


def mean(count: int, term: Callable[[Expr, Expr, int], Expr], offset: float) -> Expr:
    """``sum / count + offset``; ``term(sum, at, lanes)`` adds 16 elements to a running sum."""
    sums = Accumulators(_CHAINS)

    def emit(at: Expr, lanes: int, slot: int) -> None:
        sums[slot] = term(sums[slot], at, lanes)

    vec.sweep(count, emit, _CHAINS)
    total = vec.across(sums.fold(vec.add), vec.add)
    return vec.fma(total, T.float32(1.0 / count), T.float32(offset))


def inverse_rms(count: int, load: Callable[[Expr, int], Expr], eps: float) -> Expr:
    """``1 / sqrt(mean(x**2) + eps)``, a scalar.

    ``load(at, lanes)`` is 16 of the ``count`` elements, those from ``lanes`` on zero.
    """

    def add_square(total: Expr, at: Expr, lanes: int) -> Expr:
        x = load(at, lanes)
        return vec.fma(x, x, total)

    square = mean(count, add_square, eps)
    return T.bind(T.float32(1.0) / vec.square_root(square))
