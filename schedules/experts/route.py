"""Router logits to each token's experts and their weights."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.experts.points import ROUTING_POINTS, Levels
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.vector import LANES, Buffer, Expr

_LOWEST = -3.4028234663852886e38  # of finite float32: what was chosen, and padding


@dataclass(frozen=True)
class RouteOp:
    """The routing of m tokens, as ``slmtvm.ir.experts.Routing`` defines it.

    A token whose logits are no numbers still gets experts that exist. ``roundings``: points of
    ROUTING_POINTS that are rounded.
    """

    m: int
    experts: int
    top_k: int
    score: str
    normalize: str
    eps: float = 0.0
    scale: float = 1.0
    has_bias: bool = False
    roundings: tuple[tuple[str, Levels], ...] = ()

    def __post_init__(self) -> None:
        assert self.score in ("none", "sigmoid", "softmax"), self
        assert self.normalize in ("none", "sum", "softmax"), self
        assert {point for point, _ in self.roundings} <= set(ROUTING_POINTS), self
        assert 0 < self.top_k <= self.experts and self.m > 0, self

    @property
    def name(self) -> str:
        """A name that says all that the code depends on."""
        numbers = struct.pack(">ff", self.eps, self.scale).hex()
        parts = ["route", self.score, self.normalize, numbers, *["bias"] * self.has_bias]
        for point, (step, low, high) in self.roundings:
            parts.append(f"{point}{struct.pack('>f', step).hex()}_{-low}_{high}")
        return "_".join([*parts, f"m{self.m}_e{self.experts}_k{self.top_k}"])


def build_route(op: RouteOp) -> Kernel:
    """(logits float32 (m, experts), [bias float32 (experts,)]) -> experts int32 (m, top_k),
    weights float32 (m, top_k); one block for each token."""
    tensors = [Tensor("logits", (op.m, op.experts), "float32")]
    tensors += [Tensor("bias", (op.experts,), "float32")] * op.has_bias
    tensors.append(Tensor("experts", (op.m, op.top_k), "int32"))
    tensors.append(Tensor("weights", (op.m, op.top_k), "float32"))
    levels = dict(op.roundings)

    def rounded(point: str, x: Expr) -> Expr:
        return vec.rounded(x, *levels[point]) if point in levels else x

    def body(row: Expr, *arguments: Buffer) -> None:
        named = dict(zip((t.name for t in tensors), arguments, strict=True))
        scores = _Row.copied(named["logits"], T.bind(row * op.experts), op.experts)
        if op.score == "softmax":
            scores.softmax()
        elif op.score == "sigmoid":
            scores.map(vec.sigmoid)
        if "scores" in levels:
            scores.map(lambda x: rounded("scores", x))
        by = _Row.copied(scores.buffer, T.int32(0), op.experts)
        if op.has_bias:
            bias = _Row.copied(named["bias"], T.int32(0), op.experts)
            by.combine(bias, vec.add)
        if "selection" in levels:
            by.map(lambda x: rounded("selection", x))
        picked = _Row(op.top_k)
        picked.fill(0.0 if op.normalize == "sum" else _LOWEST)
        first = T.bind(row * op.top_k)
        with T.serial(0, op.top_k) as slot:
            best = _take_largest(by, op.experts)
            T.buffer_store(named["experts"], best, [first + slot])
            T.buffer_store(picked.buffer, scores.buffer[best], [slot])
        if op.normalize == "softmax":
            picked.softmax()
        elif op.normalize == "sum":
            total, eps = picked.sum(), T.float32(op.eps)
            if "sum" in levels:
                total = vec.rounded_onto(total, *levels["sum"], eps)
            else:
                total = T.bind(total + eps)
            total = vec.splat(rounded("divisor", total))
            picked.map(lambda x: T.bind(x / total))
        if op.scale != 1.0:
            picked.map(lambda x: T.bind(x * vec.splat(op.scale)))
        for at in range(0, op.top_k, LANES):
            value = vec.load(picked.buffer, T.int32(at))
            vec.store_part(named["weights"], first + at, value, min(LANES, op.top_k - at))

    return define(op.name, tensors, body, grid=op.m, outputs=["experts", "weights"])


def _take_largest(values: _Row, count: int) -> Expr:
    """The index of the largest of ``count`` values, the first where several are; 0 where all are
    no numbers. It becomes the lowest."""
    best = T.alloc_buffer((1,), "int32", scope="local")
    largest = T.alloc_buffer((1,), "float32", scope="local")
    T.buffer_store(best, T.int32(0), [0])
    T.buffer_store(largest, T.float32(_LOWEST), [0])
    with T.serial(0, count) as index:
        value = T.bind(values.buffer[index])
        with T.If(value > largest[0]), T.Then():
            T.buffer_store(best, index, [0])
            T.buffer_store(largest, value, [0])
    found = T.bind(best[0])
    T.buffer_store(values.buffer, T.float32(_LOWEST), [found])
    return found


class _Row:
    """``count`` float32 in a buffer of whole vectors."""

    def __init__(self, count: int) -> None:
        self._places = range(0, count, LANES)
        self.buffer = T.alloc_buffer((len(self._places) * LANES,), "float32", scope="local")

    @staticmethod
    def copied(source: Buffer, start: Expr, count: int) -> _Row:
        """A copy of ``count`` elements from ``start``, the lowest number behind them."""
        row = _Row(count)
        row.fill(_LOWEST)
        for at, lanes in vec.pieces(count):
            vec.store(row.buffer, T.int32(at), vec.load(source, start + at, lanes), lanes)
        return row

    def fill(self, value: float) -> None:
        self.map(lambda _: vec.splat(value))

    def map(self, function: Callable[[Expr], Expr]) -> None:
        """Replace every element x by ``function(x)``."""
        for at in self._places:
            value = function(vec.load(self.buffer, T.int32(at)))
            vec.store(self.buffer, T.int32(at), value)

    def combine(self, other: _Row, function: Callable[[Expr, Expr], Expr]) -> None:
        """Replace every element x by ``function(x, the element of other)``."""
        for at in self._places:
            pair = (vec.load(row.buffer, T.int32(at)) for row in (self, other))
            vec.store(self.buffer, T.int32(at), T.bind(function(*pair)))

    def fold(self, function: Callable[[Expr, Expr], Expr]) -> Expr:
        """All elements, padding included, combined into one number."""
        value = vec.load(self.buffer, T.int32(0))
        for at in self._places[1:]:
            value = T.bind(function(value, vec.load(self.buffer, T.int32(at))))
        return vec.across(value, function)

    def sum(self) -> Expr:
        return self.fold(vec.add)

    def softmax(self) -> None:
        """Softmax over all elements; padding must be the lowest number."""
        most = vec.splat(self.fold(vec.maximum))
        self.map(lambda x: vec.exp(T.bind(x - most)))
        total = vec.splat(self.sum())
        self.map(lambda x: T.bind(x / total))
