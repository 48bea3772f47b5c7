"""Attention over all positions as nodes of a frozen graph."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.graph import Array, Constant, Node

_VERSION = 17  # of the operator set of what is written


@dataclass(frozen=True, eq=False)
class Side:
    """Lines of a product's operand: of which token of ``source`` and which head each is, -1 where
    it is padding; the features of each head (heads, d); and what multiplies all of them."""

    source: str
    axis: int  # of the tokens
    token: Array
    head: Array
    features: Array
    factor: float


@dataclass(frozen=True, eq=False)
class Square:
    """An attention: operands, which of the values' heads each query head has, what is added to
    scores (heads, n, n) and multiplies weights (heads, n, 1); ``order`` of the result's rows."""

    sides: tuple[Side, Side, Side]
    heads: tuple[Array, Array, Array]
    scale: float
    added: Array
    kept: Array
    order: Array


class SquareNodes:
    """Nodes for the value ``name``, and their constants."""

    def __init__(self, frozen: Frozen, name: str) -> None:
        self._frozen, self._name, self._count = frozen, name, 0

    def write(self, square: Square) -> Iterator[Node]:
        n = self._frozen.length
        parts: list[str] = []
        for side, heads, perm in zip(
            square.sides, square.heads, ((1, 0, 2), (1, 2, 0), (1, 0, 2)), strict=True
        ):
            shape = self._frozen.shapes[side.source]
            features = side.features[heads]
            rows = yield from self._node("Reshape", side.source, self._ints(n, shape[-1]))
            rows = yield from self._node("Gather", rows, self._ints(*features.reshape(-1)), axis=1)
            rows = yield from self._node("Reshape", rows, self._ints(n, *features.shape))
            parts.append((yield from self._node("Transpose", rows, perm=perm)))
        q, k, v = parts
        scores = yield from self._node("MatMul", q, k)
        scores = yield from self._node("Mul", scores, self._constant(np.float32(square.scale)))
        added = square.added[:1] if (square.added == square.added[:1]).all() else square.added
        scores = yield from self._node(
            "Add", scores, self._constant(added.astype(np.float32), of_sequence=True)
        )
        weights = yield from self._node("Softmax", scores, axis=-1)
        kept = self._constant(square.kept.astype(np.float32), of_sequence=True)
        weights = yield from self._node("Mul", weights, kept)
        result = yield from self._node("MatMul", weights, v)
        flat = self._ints(square.order.size, -1)
        result = yield from self._node("Reshape", result, flat)
        result = yield from self._node("Gather", result, self._ints(*square.order), axis=0)
        dims = self._ints(*self._frozen.shapes[self._name])
        yield self._made("Reshape", (result, dims), self._name)

    def _node(self, op_type: str, *inputs: str, **attrs: Any) -> Generator[Node, None, str]:
        self._count += 1
        output = f"{self._name}#{self._count}"
        yield self._made(op_type, inputs, output, **attrs)
        return output

    def _made(self, op_type: str, inputs: Sequence[str], output: str, **attrs: Any) -> Node:
        return Node("", op_type, _VERSION, output, tuple(inputs), (output,), attrs)

    def _ints(self, *numbers: int) -> str:
        return self._constant(np.array(numbers, np.int64))

    def _constant(self, array: Any, *, of_sequence: bool = False) -> str:
        self._count += 1
        name = f"{self._name}#{self._count}"
        self._frozen.constants[name] = Constant.of(name, np.asarray(array))
        if of_sequence:
            self._frozen.of_sequence.add(name)
        return name
