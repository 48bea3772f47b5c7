"""Looks up and, where the table is quantized, dequantizes the rows of an embedding table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Kernel, Tensor, Work, define
from slmtvm.schedules.linear.packed_rows import unpack_rows
from slmtvm.schedules.linear.shape import FLOAT8, INTEGERS, bits_of
from slmtvm.schedules.linear.widening import FLOAT8 as FLOAT8_BITS
from slmtvm.schedules.linear.widening import float8
from slmtvm.schedules.vector import Buffer, Expr

FLOATS = {"f32": "float32", "f16": "float16", "bf16": "uint16"}
FORMATS = (*FLOATS, *INTEGERS, *FLOAT8)


@dataclass(frozen=True)
class EmbeddingOp:
    """y[i] = table[tokens[i]], float32 (m, dim), the table as ``slm.embedding`` has it.

    ``table_dtype`` is int8 or uint8 for the format "int8". ``scale_shape`` is (1,), (vocab,),
    (vocab, ceil(dim / group_size)) or (ceil(vocab / group_channels), dim) for formats with scales,
    () for the others; zero points, where ``zero_points``, have the same shape and the table's
    dtype. Token ids are not checked.
    """

    m: int
    vocab: int
    dim: int
    format: str
    table_dtype: str = "int8"
    scale_shape: tuple[int, ...] = ()
    zero_points: bool = False
    group_size: int = 0  # neighbours in a row that share a scale; 0 where the whole row does
    group_channels: int = 0  # rows that share scales, one for each column; 0 where none do

    def __post_init__(self) -> None:
        assert self.format in FORMATS, self.format
        assert self.table_dtype in ("int8", "uint8"), self.table_dtype
        assert self.quantized == bool(self.scale_shape), self
        assert self.quantized or not self.zero_points, self
        assert (len(self.scale_shape) == 2) == ((self.group_size or self.group_channels) > 0), self
        if self.group_size:
            assert self.scale_shape[1] == -(-self.dim // self.group_size), self
        if self.group_channels:
            assert self.scale_shape == (-(-self.vocab // self.group_channels), self.dim), self

    @property
    def quantized(self) -> bool:
        """Whether the table needs scales."""
        return self.format not in FLOATS

    @property
    def values_of_a_byte(self) -> int:
        """How many values a byte of the table holds."""
        return max(1, 8 // bits_of(self.format))

    @property
    def default_zero(self) -> int:
        """The zero point where there are none."""
        return 1 << bits_of(self.format) - 1 if self.values_of_a_byte > 1 else 0

    @property
    def name(self) -> str:
        """A name that says all that the code depends on."""
        parts = ["embedding", self.format]
        if self.format == "int8":
            parts.append(self.table_dtype)
        if self.quantized:
            grouped = f"c{self.group_channels}" if self.group_channels else f"g{self.group_size}"
            granularity = {1: "row", 2: grouped}[len(self.scale_shape)]
            parts.append("tensor" if self.scale_shape == (1,) else granularity)
        if self.zero_points:
            parts.append("zp")
        return "_".join([*parts, f"v{self.vocab}", f"m{self.m}", f"d{self.dim}"])

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """tokens, table, [scales, [zero_points]]."""
        known = {**FLOATS, "int8": self.table_dtype, "int16": "int16"}
        dtype = known.get(self.format, "uint8")
        width = -(-self.dim // self.values_of_a_byte)
        tensors = [
            Tensor("tokens", (self.m,), "int32"),
            Tensor("table", (self.vocab, width), dtype),
        ]
        if self.quantized:
            tensors.append(Tensor("scales", self.scale_shape, "float32"))
        if self.zero_points:
            tensors.append(Tensor("zero_points", self.scale_shape, dtype))
        return tuple(tensors)


def build(op: EmbeddingOp) -> Kernel:
    """The kernel of ``op``: op.inputs -> y; one block for each row."""
    tensors = (*op.inputs, Tensor("y", (op.m, op.dim), "float32"))

    def body(row: Expr, *arguments: Any) -> None:
        buffers = {t.name: a for t, a in zip(tensors, arguments, strict=True)}
        token = vec.load(buffers["tokens"], row, 1)
        size = op.group_size or op.dim
        whole, rest = divmod(op.dim, size)
        if whole == 1:
            _group(op, row, token, T.int32(0), size, buffers)
        elif whole:
            with T.serial(0, whole) as group:
                _group(op, row, token, group, size, buffers)
        if rest:
            _group(op, row, token, T.int32(whole), rest, buffers)

    touched = {t.name: op.m * _row_bytes(t) for t in op.inputs[1:] if t.shape != (1,)}
    return define(op.name, tensors, body, grid=op.m, outputs=["y"], work=Work(touched=touched))


def _row_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:]) * np.dtype(tensor.dtype).itemsize


def _group(
    op: EmbeddingOp, row: Expr, token: Expr, group: Expr, size: int, buffers: dict[str, Buffer]
) -> None:
    """The ``size`` neighbours of one scale and zero point, or a row where each column has one."""
    start = T.bind(group * (op.group_size or op.dim))
    of_all = None
    if op.quantized and not op.group_channels:
        of_all = _scale_and_zero(op, _scale_index(op, token, group), 1, buffers)

    def emit(column: Expr, count: int, _slot: int) -> None:
        for at, lanes in _pieces(op, count):
            here = T.bind(start + column + at)
            value = _stored(op, buffers["table"], token, here, lanes, at)
            if op.quantized:
                scale, zero = of_all or _of_columns(op, token, here, lanes, buffers)
                value = _scaled(op, value, scale, zero)
            vec.store(buffers["y"], row * op.dim + here, value, lanes)

    vec.sweep(size, emit)


def _pieces(op: EmbeddingOp, count: int) -> Iterator[tuple[int, int]]:
    """The parts of ``count`` neighbours that are computed at once: whole bytes, or one value."""
    each = op.values_of_a_byte
    if op.group_size % each:  # groups begin within bytes
        yield from ((at, 1) for at in range(count))
        return
    for at, lanes in vec.pieces(count):
        if lanes >= each:
            yield at, lanes
        else:
            yield from ((at + i, 1) for i in range(lanes))


def _scale_index(op: EmbeddingOp, token: Expr, group: Expr) -> Expr:
    if op.scale_shape == (1,):
        return T.int32(0)
    return token if len(op.scale_shape) == 1 else T.bind(token * op.scale_shape[1] + group)


def _scale_and_zero(
    op: EmbeddingOp, at: Expr, lanes: int, buffers: dict[str, Buffer]
) -> tuple[Expr, Expr]:
    """Scales as float32 and zero points as int32 from ``at`` on; one of these if none are given."""
    scale = vec.load(buffers["scales"], at, lanes)
    if not op.zero_points:
        return scale, T.int32(op.default_zero)
    stored = vec.load(buffers["zero_points"], at, lanes)
    return scale, T.bind(T.cast(stored, vec.dtype_of("int32", lanes)))


def _of_columns(
    op: EmbeddingOp, token: Expr, column: Expr, lanes: int, buffers: dict[str, Buffer]
) -> tuple[Expr, Expr]:
    block = T.floordiv(token, op.group_channels)
    return _scale_and_zero(op, T.bind(block * op.dim + column), lanes, buffers)


def _scaled(op: EmbeddingOp, value: Expr, scale: Expr, zero: Expr) -> Expr:
    """``(value - zero) * scale``; these are numbers, or vectors like ``value``."""
    lanes = vec.lanes_of(value)

    def wide(number: Expr) -> Expr:
        return number if vec.lanes_of(number) == lanes else vec.splat(number, lanes)

    if op.format in FLOAT8:
        return T.bind(value * wide(scale))
    whole = T.bind(value - wide(zero))
    return T.bind(T.cast(whole, vec.dtype_of("float32", lanes)) * wide(scale))


def _stored(op: EmbeddingOp, table: Buffer, token: Expr, column: Expr, lanes: int, at: int) -> Expr:
    """``lanes`` stored values: float32, or int32 where they are integers; ``at`` is where they are
    in a group."""
    if op.values_of_a_byte > 1:
        return _fields(op, table, token, column, lanes, at)
    stored = vec.load(table, T.bind(token * op.dim + column), lanes)
    if op.format == "f32":
        return stored
    if op.format == "f16":
        return vec.half_to_float(T.bind(T.reinterpret(vec.dtype_of("uint16", lanes), stored)))
    wide = T.bind(T.cast(stored, vec.dtype_of("int32", lanes)))
    if op.format == "bf16":  # the upper half of a float32
        bits = T.bind(T.shift_left(wide, vec.splat_int(16, lanes)))
        return T.bind(T.reinterpret(vec.dtype_of("float32", lanes), bits))
    if op.format in FLOAT8:
        top = T.bind(T.shift_left(wide, vec.splat_int(24, lanes)))
        return float8(FLOAT8_BITS[op.format], top)
    return wide


def _fields(op: EmbeddingOp, table: Buffer, token: Expr, column: Expr, lanes: int, at: int) -> Expr:
    """Values of which a byte holds several, the first in its lowest bits, as int32."""
    each, bits = op.values_of_a_byte, bits_of(op.format)
    mask, count = (1 << bits) - 1, max(lanes // each, 1)
    packed = vec.load(table, T.bind(token * -(-op.dim // each) + column // each), count)
    word = T.bind(T.cast(packed, vec.dtype_of("int32", count)))
    if lanes == 1:
        place = T.floormod(column, each) if op.group_size % each else T.int32(at % each)
        moved = word if place == 0 else T.shift_right(word, place * bits)
        return T.bind(T.bitwise_and(moved, vec.splat_int(mask, 1)))
    parts = [T.bind(T.bitwise_and(word, vec.splat_int(mask, count)))]
    for i in range(1, each):
        moved = T.bind(T.shift_right(word, vec.splat_int(i * bits, count)))
        last = i == each - 1
        parts.append(
            moved if last else T.bind(T.bitwise_and(moved, vec.splat_int(mask, count)))
        )  # fmt: skip
    return vec.shuffle(parts, [i // each + i % each * count for i in range(lanes)])


def reference(op: EmbeddingOp, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the kernel means: y, float32 (m, dim)."""
    tokens = inputs["tokens"]
    rows = inputs["table"][tokens]
    if op.format == "bf16":
        return rows.view(ml_dtypes.bfloat16).astype(np.float32)
    if not op.quantized:
        return rows.astype(np.float32)
    if op.format in FLOAT8:
        rows = rows.view(f"float8_{op.format}")
    rows = unpack_rows(rows, op.dim, bits_of(op.format))
    scales, default = inputs["scales"], np.int32(op.default_zero)
    zero_points = np.broadcast_to(inputs.get("zero_points", default), scales.shape)
    if op.scale_shape != (1,):
        places = tokens // (op.group_channels or 1)
        scales, zero_points = scales[places], zero_points[places]

    def spread(per: np.ndarray) -> np.ndarray:
        by_group = np.broadcast_to(per.reshape(len(per), -1), (op.m, per.size // len(per)))
        size = 1 if op.group_channels else op.group_size or op.dim
        return np.repeat(by_group, size, axis=1)[:, : op.dim].astype(np.float32)

    # Whole numbers of 16 bits at most, and float8 less 0: exact.
    return np.asarray((rows.astype(np.float32) - spread(zero_points)) * spread(scales))
