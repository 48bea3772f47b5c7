"""The graph as the importer sees it: nodes in topological order, constants as numpy views."""

from __future__ import annotations

import heapq
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slmtvm.errors import InvalidModelError, UnsupportedOpError

Array = npt.NDArray[Any]

# A constant that would need more elements than this when its stored form is expanded is a weight:
# weights are read packed by the ops that consume them and never expanded.
EXPAND_LIMIT = 1 << 18

_SMALL = 64  # elements of a constant that is compared by value


@dataclass(frozen=True)
class Quantization:
    """``(stored - zero_points) * scales``, as ONNX DequantizeLinear has it.

    scales and zero_points are scalars, vectors along ``axis``, or blocked: of the stored rank with
    ``axis`` divided by ``block_size``.
    """

    scales: Array
    zero_points: Array | None
    axis: int
    block_size: int

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError where scales or zero points do not fit stored values of ``shape``."""
        if self.zero_points is not None and self.zero_points.size != self.scales.size:
            raise ValueError(f"{self.zero_points.size} zero points, {self.scales.size} scales")
        for per in (self.scales, self.zero_points):
            if per is None or per.size == 1:
                continue
            axis = range(len(shape))[self.axis]  # raises IndexError for one that is none
            expected: tuple[int, ...] = (shape[axis],)
            if self.block_size:
                blocks = -(-shape[axis] // self.block_size)
                expected = (*shape[:axis], blocks, *shape[axis + 1 :])
            if per.shape != expected:
                raise ValueError(f"scales of shape {list(per.shape)} for values {list(shape)}")

    def transposed(self) -> Quantization:
        """That of the transposed matrix."""

        def turn(per: Array) -> Array:
            return per.T if per.ndim == 2 else per

        zeros = None if self.zero_points is None else turn(self.zero_points)
        return Quantization(turn(self.scales), zeros, 1 - self.axis % 2, self.block_size)


@dataclass(frozen=True)
class Constant:
    """A value known at compile time, as the file holds it.

    ``stored`` is a view of the file's bytes wherever possible. ``dtype`` is what the graph sees:
    where it is wider than ``stored`` the file has a widening Cast or a DequantizeLinear, which is
    never computed for a weight. ``packed`` is the logical shape of 4-bit values, whose ``stored``
    is the flat bytes, low nibble first. ``by_cast``: its integers are restored by operators other
    than DequantizeLinear. ``narrow``: bytes that the file has for it, where it was widened.
    """

    name: str
    stored: Array
    dtype: np.dtype[Any]
    quantization: Quantization | None = None
    packed: tuple[int, ...] | None = None
    signed: bool = False  # of packed values
    by_cast: bool = False
    narrow: int = 0

    @staticmethod
    def of(name: str, array: Array) -> Constant:
        return Constant(name, array, array.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape if self.packed is None else self.packed

    @property
    def plain(self) -> bool:
        """Whether ``stored`` is the value itself."""
        return self.quantization is None and self.packed is None and self.dtype == self.stored.dtype

    def values(self, *, table: bool = False) -> Array:
        """The values the graph sees; computed only for small constants and position ``table``s.

        Raises UnsupportedOpError where that would expand a weight.
        """
        if self.plain:
            return self.stored
        large = int(np.prod(self.shape, dtype=np.int64)) > EXPAND_LIMIT
        if large and not table and not self.by_cast:
            raise UnsupportedOpError(
                f"{self.name}: this operator would need the weight expanded to {self.dtype}; "
                "only matrix products and row lookups read packed weights"
            )
        stored = self.stored if self.packed is None else unpack_nibbles(self)
        if self.quantization is None:
            return stored.astype(self.dtype)
        return dequantize(stored, self.quantization).astype(self.dtype)


def unpack_nibbles(constant: Constant) -> Array:
    """The 4-bit values of ``constant`` as int8 or uint8, in its logical shape."""
    assert constant.packed is not None
    flat = constant.stored.reshape(-1)
    wide = np.stack([flat & 15, flat >> 4], axis=-1).reshape(-1)
    wide = wide[: int(np.prod(constant.packed, dtype=np.int64))].reshape(constant.packed)
    return (wide ^ 8).astype(np.int8) - np.int8(8) if constant.signed else wide


def pack_nibbles(values: Array) -> Array:
    """uint8 values 0..15 in any shape -> flat bytes, the first value in the low nibble."""
    flat = values.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return np.asarray(flat[::2] | (flat[1::2] << 4))


def transposed(constant: Constant) -> Constant:
    """The transpose of a constant matrix: a view, but of 4-bit values, which are packed anew."""
    old = constant.quantization
    turned = replace(constant, quantization=None if old is None else old.transposed())
    if constant.packed is None:
        return replace(turned, stored=constant.stored.T)
    values = unpack_nibbles(replace(constant, signed=False))
    return replace(turned, stored=pack_nibbles(values.T), packed=constant.packed[::-1])


def reshaped(constant: Constant, shape: tuple[int, ...]) -> Constant | None:
    """``constant`` with other dimensions of 1; None where more than these would change."""
    old = constant.shape
    kept = [axis for axis, size in enumerate(old) if size != 1]
    places = [axis for axis, size in enumerate(shape) if size != 1]
    if [old[axis] for axis in kept] != [shape[axis] for axis in places]:
        return None
    quantization = constant.quantization
    if quantization is not None:
        axis = quantization.axis % max(len(old), 1)
        if quantization.block_size and (axis not in kept or quantization.scales.ndim != len(old)):
            return None
        place = places[kept.index(axis)] if axis in kept else 0
        sizes = list(shape)

        blocks = quantization.block_size

        def fit(per: Array) -> Array:
            if not blocks:
                return per
            sizes[place] = per.shape[axis]
            return per.reshape(sizes)

        zeros = quantization.zero_points
        quantization = Quantization(
            fit(quantization.scales),
            None if zeros is None else fit(zeros),
            place,
            blocks,
        )
    changed = replace(constant, quantization=quantization)
    if constant.packed is not None:
        return replace(changed, packed=shape)
    return replace(changed, stored=constant.stored.reshape(shape))


def dequantize(stored: Array, quantization: Quantization) -> Array:
    """``(stored - zero_points) * scales`` in float32."""
    scales, zeros = quantization.scales, quantization.zero_points
    axis, block = quantization.axis, quantization.block_size
    value = stored.astype(np.float32)
    if zeros is not None:
        value = value - spread(zeros, stored.shape, axis, block).astype(np.float32)
    with np.errstate(over="ignore"):  # a mask's least number, of many steps
        return value * spread(scales, stored.shape, axis, block).astype(np.float32)


def spread(per: Array, shape: tuple[int, ...], axis: int, block_size: int) -> Array:
    """Scales or zero points of values of ``shape``, so that they broadcast with them."""
    if per.size == 1:
        return per.reshape(())
    if block_size:
        repeated = np.repeat(per, block_size, axis=axis)
        return repeated.take(np.arange(shape[axis]), axis=axis)
    return per.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


@dataclass(frozen=True)
class Node:
    """One operator call; an absent optional input is the empty name.

    The values that a node's subgraphs take from outside of them follow its own inputs.
    """

    domain: str
    op_type: str
    version: int  # of the operator set that the file imports for ``domain``
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]

    @property
    def label(self) -> str:
        """How an error names this node."""
        operator = f"{self.domain}.{self.op_type}" if self.domain else self.op_type
        return f"{operator} node {self.name or self.outputs[0]!r}"


def attribute_key(value: Any) -> Hashable:
    """Equal for attributes that say the same: 1 is not 1.0, and -0.0 not 0.0."""
    return constant_key(value) if isinstance(value, Constant) else (type(value), repr(value))


def constant_key(value: Constant) -> Hashable:
    """Equal for constants that hold the same; large ones are compared by identity."""
    if value.stored.size > _SMALL or value.quantization is not None:
        return ("tensor", id(value))
    return (
        "tensor", str(value.dtype), str(value.stored.dtype), value.shape, value.packed,
        value.signed, value.stored.tobytes(),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Subgraph:
    """A branch of an If: sorted nodes that may read ``captured`` values of the graph around it."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    initializers: Mapping[str, Constant]
    captured: tuple[str, ...]


@dataclass(frozen=True)
class Port:
    """A graph input or output: dims are ints, names of symbols, or None."""

    name: str
    elem_type: int
    dims: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Decision:
    """That the value ``condition`` is ``outcome``, on which a part of the graph was left out.

    For sequences of ``since`` tokens and more; for shorter ones the file takes the other part.
    """

    condition: str
    outcome: bool
    where: str
    since: int = 1


@dataclass(frozen=True)
class Graph:
    """A checked graph: every name is defined once, before it is used."""

    path: Path
    nodes: tuple[Node, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    initializers: Mapping[str, Constant]
    declared: Mapping[str, Port] = field(default_factory=dict)  # the file's value_info
    decisions: tuple[Decision, ...] = ()

    def where(self, node: Node) -> str:
        return f"{self.path}: {node.label}"


def needed(
    nodes: Sequence[Node], values: Iterable[str], given: Container[str] = ()
) -> tuple[Node, ...]:
    """Those of ``nodes``, which are in order, that ``values`` are computed by from ``given``."""
    wanted = set(values)
    kept = []
    for node in reversed(nodes):
        if any(name in wanted and name not in given for name in node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return tuple(reversed(kept))


def sort_nodes(nodes: Iterable[Node], known: Iterable[str], path: Path) -> tuple[Node, ...]:
    """``nodes`` in an order in which every input is defined before it is used; stable.

    Raises InvalidModelError on a name defined twice, an undefined name, or a cycle.
    """
    nodes = list(nodes)
    producer: dict[str, int] = {}
    defined = set(known)
    for index, node in enumerate(nodes):
        for name in filter(None, node.outputs):
            if name in defined:
                raise InvalidModelError(
                    f"value {name!r} is defined twice", where=f"{path}: {node.label}"
                )
            defined.add(name)
            producer[name] = index
    users: dict[int, list[int]] = {}
    waiting = [0] * len(nodes)
    for index, node in enumerate(nodes):
        for name in {i for i in node.inputs if i}:
            if name in producer:
                users.setdefault(producer[name], []).append(index)
                waiting[index] += 1
            elif name not in defined:
                raise InvalidModelError(
                    f"input {name!r} is defined nowhere", where=f"{path}: {node.label}"
                )
    order: list[int] = []
    ready = [index for index, count in enumerate(waiting) if count == 0]  # sorted, so a heap
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for user in users.get(index, ()):
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(ready, user)
    if len(order) != len(nodes):
        stuck = next(i for i, count in enumerate(waiting) if count > 0)
        raise InvalidModelError(
            "the graph has a cycle through this node", where=f"{path}: {nodes[stuck].label}"
        )
    return tuple(nodes[index] for index in order)
