"""How values lie in rows of tokens, whatever an exporter made of their dimensions.

Exporters reshape and transpose in countless ways; what matters is only where an element came from.
Every dynamic value of the frozen graph gets an array of token numbers, and with it a canonical
layout: row ``l`` holds the elements of token ``l`` in the value's own order. A transposed head
layout (1, heads, length, head_dim) and a flat one (1, length, heads * head_dim) are then the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.frame.tokens import MIXED, NO_TOKEN, token_maps
from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.graph import Array, Graph, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import compute, operator_of
from slmtvm.importer.operators.elementwise import FLOAT_TYPES


@dataclass(frozen=True)
class Trace:
    """A value as elements of ``source``: ``index``, of the value's shape, holds flat positions."""

    source: str
    index: Array
    factor: float = 1.0


@dataclass
class Frame:
    """A graph frozen at a short length, for structure, and at the full context, for tables."""

    small: Frozen
    full: Frozen
    _layouts: dict[str, Array] = field(default_factory=dict)
    _token_axes: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.small.graph

    @property
    def samples(self) -> int:
        """How many rows recognisers compute to see what a value is."""
        return self.small.length

    @cached_property
    def producers(self) -> dict[str, Node]:
        return {o: n for n in self.graph.nodes for o in n.outputs if o in self.small.shapes}

    @cached_property
    def order(self) -> dict[str, int]:
        """The place of each value's producer in the graph; -1 for the tokens."""
        return {o: i for i, n in enumerate(self.graph.nodes) for o in n.outputs}

    @cached_property
    def users(self) -> dict[str, int]:
        """How many dynamic nodes read a value."""
        counts: dict[str, int] = {}
        for node in self.graph.nodes:
            if any(o in self.small.shapes for o in node.outputs):
                for name in set(node.inputs):
                    counts[name] = counts.get(name, 0) + 1
        return counts

    @cached_property
    def tokens(self) -> dict[str, Array]:
        return token_maps(self.small)

    def dynamic(self, node: Node) -> list[str]:
        """The inputs of ``node`` that depend on the tokens."""
        return [i for i in node.inputs if i in self.small.shapes]

    def uniform(self, name: str) -> float | None:
        """The one number that all elements of a constant have, at the context's length too."""
        number = uniform(self.small, name)
        return number if number is not None and number == uniform(self.full, name) else None

    def is_fixed(self, nodes: Iterable[Node]) -> bool:
        """Whether what ``nodes`` do to single elements is the same at every position.

        A constant that follows from the length may be the same at the few positions of the short
        sequence alone, on which recognisers try ``nodes``.
        """
        return all(
            self._is_same_constant(name)
            for node in nodes
            if operator_of(node).kind is Kind.ELEMENTWISE
            for name in node.inputs
            if name in self.small.constants
        )

    def _is_same_constant(self, name: str) -> bool:
        small, full = self.small.constants[name], self.full.constants.get(name)
        if full is small or small.dtype.kind in "iu" or self.uniform(name) is not None:
            return True
        if full is None or full.shape != small.shape or full.quantization is not small.quantization:
            return False
        return full.stored is small.stored or np.array_equal(full.stored, small.stored)

    def where(self, value: str) -> str:
        node = self.producers.get(value)
        return str(self.graph.path) if node is None else self.graph.where(node)

    def rows(self, value: str) -> Array:
        """(length, features) flat element numbers of ``value``, row by row.

        Raises UnsupportedOpError where an element belongs to several tokens, or tokens have
        different numbers of elements.
        """
        known = self._layouts.get(value)
        if known is not None:
            return known
        tokens = self.tokens[value].reshape(-1)
        length = self.small.length
        if (tokens == MIXED).any():
            self._raise_mixed(value)
        counts = np.bincount(tokens[tokens >= 0], minlength=length)
        if (tokens == NO_TOKEN).any() or (counts != counts[0]).any() or not counts[0]:
            raise UnsupportedOpError(
                f"value {value!r} does not hold one row for each token", where=self.where(value)
            )
        rows = np.argsort(tokens, kind="stable").reshape(length, -1)
        full = self.full.shapes[value]
        if int(np.prod(full, dtype=np.int64)) * length != tokens.size * self.full.length:
            raise UnsupportedOpError(
                f"value {value!r} has rows whose width follows the sequence length",
                where=self.where(value),
            )
        self._layouts[value] = rows
        return rows

    def places(self, value: str, elements: Array) -> tuple[Array, Array]:
        """The tokens that flat ``elements`` of ``value`` belong to, and their features there."""
        rows = self.rows(value)
        place = np.empty(rows.size, np.int64)
        place[rows.reshape(-1)] = np.arange(rows.size)
        token, feature = np.divmod(place[elements], rows.shape[1])
        return token, feature

    def features(self, value: str) -> int:
        """The width of a row of ``value``."""
        return int(self.rows(value).shape[1])

    def sequence_axis(self, value: str) -> int:
        """The axis of ``value`` that holds the tokens, in both lengths.

        Raises UnsupportedOpError where there is no such axis, or it does not give the rows.
        """
        axis, outer, inner = self.token_axis(value)
        if outer * inner == 1:
            return axis
        raise UnsupportedOpError(
            f"value {value!r} has no axis of tokens alone: {list(self.small.shapes[value])}",
            where=self.where(value),
        )

    def token_axis(self, value: str) -> tuple[int, int, int]:
        """(axis, outer, inner): that axis holds ``outer`` x tokens x ``inner`` entries.

        Raises UnsupportedOpError where there is no such axis, or it does not give the rows.
        """
        known = self._token_axes.get(value)
        if known is not None:
            return known
        small, full = self.small.shapes[value], self.full.shapes[value]
        axes = [i for i, (a, b) in enumerate(zip(small, full, strict=True)) if a != b]
        if self.small.length == self.full.length:  # there is one length, which any axis may have
            axes = [i for i, size in enumerate(small) if size % self.small.length == 0]
        elif len(axes) > 1:
            axes = []
        numbers = np.arange(int(np.prod(small, dtype=np.int64))).reshape(small)
        for axis in axes:
            parts, rest = divmod(small[axis], self.small.length)
            if rest or full[axis] != parts * self.full.length:
                continue
            for found in ((axis, 1, parts), (axis, parts, 1)):
                if (_by_token(numbers, found, self.small.length) == self.rows(value)).all():
                    self._token_axes[value] = found
                    return found
        raise UnsupportedOpError(
            f"value {value!r} has no axis of tokens: {list(small)}", where=self.where(value)
        )

    def to_rows(self, value: str, array: Array, length: int) -> Array:
        """``array``, which lies as ``value`` does at ``length`` tokens, as (length, features)."""
        return _by_token(array, self.token_axis(value), length)

    def from_rows(self, value: str, rows: Array) -> Array:
        """The inverse of ``to_rows``, for as many tokens as there are rows."""
        frozen = self.small if len(rows) == self.small.length else self.full
        (axis, outer, inner), shape = self.token_axis(value), frozen.shapes[value]
        before, after = shape[:axis], shape[axis + 1 :]
        split = rows.reshape(len(rows), *before, outer, inner, *after)
        whole = (*before, outer * len(rows) * inner, *after)
        return np.moveaxis(split, 0, axis + 1).reshape(whole)

    def _raise_mixed(self, value: str) -> None:
        """Name the first node on the way to ``value`` that combines different tokens."""
        while True:
            node = self.producers[value]
            mixed = [i for i in self.dynamic(node) if (self.tokens[i] == MIXED).any()]
            if not mixed:
                break
            value = mixed[0]
        raise UnsupportedOpError(
            "combines different positions and is not an attention by a softmax over keys; only "
            "such attention may",
            where=self.graph.where(node),
        )

    def trace(self, value: str, *, scaled: bool = False) -> Trace:
        """Follow data movement (with ``scaled`` also products with one number) back from ``value``.

        Casts between number types are movement: the values stay the same.
        """
        chain: list[tuple[Node, str]] = []
        factor = 1.0
        source = value
        while (node := self.producers.get(source)) is not None:
            dynamic = self.dynamic(node)
            if len(set(dynamic)) != 1 or len(dynamic) != 1:
                break
            scale = self._scale(node) if scaled else None
            if scale is not None:
                factor *= scale
            elif not self._moves(node):
                break
            chain.append((node, source))
            source = dynamic[0]
        shape = self.small.shapes[source]
        index = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.int64).reshape(shape)
        for node, output in reversed(chain):
            index = self._move(node, index, output)
        return Trace(source, index, factor)

    def _moves(self, node: Node) -> bool:
        operator = operator_of(node)
        if node.op_type == "Cast":
            before = self.small.dtypes[node.inputs[0]]
            after = self.small.dtypes[node.outputs[0]]
            if before.kind in "iu" and after.kind in "iu":
                # Token ids come in 64 bits and fit in 32.
                return np.can_cast(before, after) or after.itemsize >= 4
            return before.kind != "b" and node.attrs["to"] in FLOAT_TYPES
        if operator.kind is Kind.SCATTER:  # nothing into it, such as into the rows that are hidden
            places = [f.constants.get(node.inputs[1]) for f in (self.small, self.full)]
            return all(p is not None and 0 in p.shape for p in places)
        if operator.kind is not Kind.MOVE or self.small.is_lookup(node):
            return False
        if operator.data is None:  # Concat: only with empty pieces, such as an empty cache
            constants = [self.small.constants[i] for i in node.inputs if i in self.small.constants]
            return all(0 in c.shape for c in constants)
        source = node.inputs[0]
        # What leaves padding behind is where its rows are first whole.
        return source in self.small.shapes and not (self.tokens[source] == NO_TOKEN).any()

    def _scale(self, node: Node) -> float | None:
        """The number by which ``node`` multiplies its one dynamic input, or None."""
        if node.op_type == "Neg":
            return -1.0
        if node.op_type not in ("Mul", "Div") or (
            node.op_type == "Div" and node.inputs[0] in self.small.constants
        ):
            return None
        (other,) = (i for i in node.inputs if i in self.small.constants)
        shape = self.small.shapes[node.outputs[0]]
        if shape != self.small.shapes[self.dynamic(node)[0]]:
            return None
        number = self.uniform(other)
        if number is None or number == 0:
            return None
        return number if node.op_type == "Mul" else 1.0 / number

    def _move(self, node: Node, index: Array, output: str) -> Array:
        if operator_of(node).kind is not Kind.MOVE:
            return index
        inputs: list[Array | None] = []
        for name in node.inputs:
            if name in self.small.shapes:
                inputs.append(index)
            else:
                inputs.append(self.small.constants[name].values() if name else None)
        results = compute(self.graph, node, inputs)
        return results[node.outputs.index(output)].astype(np.int64)


def _by_token(array: Array, place: tuple[int, int, int], length: int) -> Array:
    """``array`` with its tokens at ``place``, see ``Frame.token_axis``, as (length, features)."""
    axis, outer, inner = place
    split = array.reshape(*array.shape[:axis], outer, length, inner, *array.shape[axis + 1 :])
    return np.moveaxis(split, axis + 1, 0).reshape(length, -1)


def uniform(frozen: Frozen, name: str) -> float | None:
    """The one number that all elements of a constant have, or None."""
    constant = frozen.constants.get(name)
    if constant is None or not constant.plain or constant.stored.size == 0:
        return None
    flat = constant.stored.reshape(-1)
    # "V" is how numpy knows bfloat16
    return float(flat[0]) if flat.dtype.kind in "biufV" and (flat == flat[0]).all() else None
