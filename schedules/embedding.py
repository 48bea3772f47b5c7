"""Looks up and, where the table is quantized, dequantizes the rows of an embedding table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Kernel, Tensor, Work, define
from slmtvm.schedules.vector import Buffer, Expr

FORMATS = ("f32", "f16", "bf16", "int8", "int4")
_INT4_ZERO_POINT = 8


@dataclass(frozen=True)
class EmbeddingOp:
    """y[i] = table[tokens[i]], float32 (m, dim), the table as ``slm.embedding`` has it.

    ``table_dtype`` is int8 or uint8 for the format "int8". ``scale_shape`` is (1,), (vocab,) or
    (vocab, ceil(dim / group_size)) for the quantized formats, () for the others; zero points, where
    ``zero_points``, have the same shape and the table's dtype. Token ids are not checked.
    """

    m: int
    vocab: int
    dim: int
    format: str
    table_dtype: str = "int8"
    scale_shape: tuple[int, ...] = ()
    zero_points: bool = False
    group_size: int = 0  # neighbours in a row that share a scale; 0 where the whole row does

    def __post_init__(self) -> None:
        assert self.format in FORMATS, self.format
        assert self.table_dtype in ("int8", "uint8"), self.table_dtype
        assert self.quantized == bool(self.scale_shape), self
        assert self.quantized or not self.zero_points, self
        assert (len(self.scale_shape) == 2) == (self.group_size > 0), self
        if self.group_size:
            assert self.scale_shape[1] == -(-self.dim // self.group_size), self
            assert self.group_size % 2 == 0, self

    @property
    def quantized(self) -> bool:
        """Whether the table needs scales."""
        return self.format in ("int8", "int4")

    @property
    def name(self) -> str:
        """A name that says all that the code depends on."""
        parts = ["embedding", self.format]
        if self.format == "int8":
            parts.append(self.table_dtype)
        if self.quantized:
            granularity = {1: "row", 2: f"g{self.group_size}"}[len(self.scale_shape)]
            parts.append("tensor" if self.scale_shape == (1,) else granularity)
        if self.zero_points:
            parts.append("zp")
        return "_".join([*parts, f"v{self.vocab}", f"m{self.m}", f"d{self.dim}"])

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """tokens, table, [scales, [zero_points]]."""
        floats = {"f32": "float32", "f16": "float16", "bf16": "uint16"}
        dtype = {**floats, "int8": self.table_dtype, "int4": "uint8"}[self.format]
        width = -(-self.dim // 2) if self.format == "int4" else self.dim
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
    """The ``size`` neighbours of one scale and zero point."""
    start = T.bind(group * (op.group_size or op.dim))
    scale = zero_point = None
    if op.quantized:
        index = _scale_index(op, token, group)
        scale = vec.load(buffers["scales"], index, 1)
        zero_point = T.int32(_INT4_ZERO_POINT if op.format == "int4" else 0)
        if op.zero_points:
            zero_point = T.bind(T.cast(vec.load(buffers["zero_points"], index, 1), "int32"))

    def emit(column: Expr, count: int, _slot: int) -> None:
        for at, lanes in vec.pieces(count):
            here = T.bind(start + column + at)
            value = _stored(op, buffers["table"], token, here, lanes)
            if scale is not None:
                whole = T.bind(value - vec.splat(zero_point, lanes))
                value = T.bind(
                    T.cast(whole, vec.dtype_of("float32", lanes)) * vec.splat(scale, lanes)
                )
            vec.store(buffers["y"], row * op.dim + here, value, lanes)

    vec.sweep(size, emit)


def _scale_index(op: EmbeddingOp, token: Expr, group: Expr) -> Expr:
    if op.scale_shape == (1,):
        return T.int32(0)
    return token if len(op.scale_shape) == 1 else T.bind(token * op.scale_shape[1] + group)


def _stored(op: EmbeddingOp, table: Buffer, token: Expr, column: Expr, lanes: int) -> Expr:
    """``lanes`` stored values: float32, or int32 where they are quantized."""
    if op.format == "int4":
        half = max(lanes // 2, 1)
        packed = vec.load(table, T.bind(token * -(-op.dim // 2) + column // 2), half)
        pairs = T.bind(T.cast(packed, vec.dtype_of("int32", half)))
        low = T.bind(T.bitwise_and(pairs, vec.splat_int(15, half)))
        if lanes == 1:  # the last of an odd number
            return low
        high = T.bind(T.shift_right(pairs, vec.splat_int(4, half)))
        return vec.shuffle([low, high], [i // 2 + i % 2 * half for i in range(lanes)])
    stored = vec.load(table, T.bind(token * op.dim + column), lanes)
    if op.format == "f32":
        return stored
    if op.format == "f16":
        return vec.half_to_float(T.bind(T.reinterpret(vec.dtype_of("uint16", lanes), stored)))
    wide = T.bind(T.cast(stored, vec.dtype_of("int32", lanes)))
    if op.format == "bf16":  # the upper half of a float32
        bits = T.bind(T.shift_left(wide, vec.splat_int(16, lanes)))
        return T.bind(T.reinterpret(vec.dtype_of("float32", lanes), bits))
    return wide


def reference(op: EmbeddingOp, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the kernel means: y, float32 (m, dim)."""
    rows = inputs["table"][inputs["tokens"]]
    if op.format == "bf16":
        return rows.view(ml_dtypes.bfloat16).astype(np.float32)
    if not op.quantized:
        return rows.astype(np.float32)
    if op.format == "int4":
        rows = np.stack([rows & 15, rows >> 4], 2).reshape(op.m, -1)[:, : op.dim]
    scales = inputs["scales"]
    default = np.int32(_INT4_ZERO_POINT if op.format == "int4" else 0)
    zero_points = np.broadcast_to(inputs.get("zero_points", default), scales.shape)
    if op.scale_shape != (1,):
        scales, zero_points = scales[inputs["tokens"]], zero_points[inputs["tokens"]]

    def spread(per: np.ndarray) -> np.ndarray:
        by_group = np.broadcast_to(per.reshape(len(per), -1), (op.m, per.size // len(per)))
        return np.repeat(by_group, op.group_size or op.dim, axis=1)[:, : op.dim]

    whole = rows.astype(np.int32) - spread(zero_points).astype(np.int32)
    return np.asarray(whole.astype(np.float32) * spread(scales))
