"""Matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from slmtvm.importer.graph import Array
from slmtvm.importer.operators.registry import INT, Attrs, Kind, Shape, register
from slmtvm.ir.reference.rounding import quantize_blocks
from slmtvm.schedules.linear.packed_rows import unpack_rows

_INT8_ACTIVATIONS = 4  # the accuracy_level that asks for them


def _matmul_shape(a: Shape, b: Shape) -> Shape:
    if not a or not b:
        raise ValueError("a scalar cannot be multiplied as a matrix")
    if a[-1] != b[max(len(b) - 2, 0)]:
        raise ValueError(f"inner dimensions differ: {list(a)} and {list(b)}")
    batch = np.broadcast_shapes(a[:-2], b[:-2])
    return batch + (a[-2:-1] if len(a) > 1 else ()) + (b[-1:] if len(b) > 1 else ())


def _matmul_shapes(_attrs: Attrs, shapes: Sequence[Any], _constants: Sequence[Any]) -> list[Shape]:
    return [_matmul_shape(shapes[0], shapes[1])]


def _matmul_work(_attrs: Attrs, inputs: Sequence[Any]) -> int:
    shape = _matmul_shape(inputs[0].shape, inputs[1].shape)
    return math.prod(shape) * max(inputs[0].shape[-1], 1)


@register("MatMul", 1, Kind.CONTRACT, shapes=_matmul_shapes, size=_matmul_work)
def matmul(_attrs: Attrs, a: Array, b: Array) -> Any:
    return np.matmul(a, b)


def _gemm_shapes(attrs: Attrs, shapes: Sequence[Any], _constants: Sequence[Any]) -> list[Shape]:
    a, b = shapes[:2]
    if len(a) != 2 or len(b) != 2:
        raise ValueError(f"Gemm takes matrices, found shapes {list(a)} and {list(b)}")
    m, k = a[::-1] if attrs.get("transA", 0) else a
    k2, n = b[::-1] if attrs.get("transB", 0) else b
    if k != k2:
        raise ValueError(f"inner dimensions differ: {k} and {k2}")
    if len(shapes) > 2 and shapes[2] is not None:
        np.broadcast_shapes(shapes[2], (m, n))
    return [(m, n)]


def _gemm_work(attrs: Attrs, inputs: Sequence[Any]) -> int:
    return math.prod(_gemm_shapes(attrs, [i.shape for i in inputs[:2]], ())[0]) * max(
        inputs[0].shape
    )


@register("Gemm", 7, Kind.CONTRACT, shapes=_gemm_shapes, size=_gemm_work)
def gemm(attrs: Attrs, a: Array, b: Array, c: Array | None = None) -> Any:
    a = a.T if attrs.get("transA", 0) else a
    b = b.T if attrs.get("transB", 0) else b
    product = attrs.get("alpha", 1.0) * np.matmul(a, b)
    return product if c is None else product + attrs.get("beta", 1.0) * c


@register(
    "MatMulInteger",
    10,
    Kind.CONTRACT,
    shapes=_matmul_shapes,
    size=_matmul_work,
    result=lambda *_: np.dtype(np.int32),
)
def matmul_integer(
    _attrs: Attrs, a: Array, b: Array, a_zero: Array | None = None, b_zero: Array | None = None
) -> Any:
    wide_a = a.astype(np.int32) - (0 if a_zero is None else a_zero.astype(np.int32))
    wide_b = b.astype(np.int32) - (0 if b_zero is None else b_zero.astype(np.int32))
    return np.matmul(wide_a, wide_b)


def nbits_shapes(attrs: Attrs, shapes: Sequence[Any], _constants: Sequence[Any]) -> list[Shape]:
    """Those of a product with packed weights."""
    if not shapes[0] or shapes[0][-1] != attrs["K"]:
        raise ValueError(f"input {list(shapes[0])} where K is {attrs['K']}")
    return [(*shapes[0][:-1], attrs["N"])]


@register(
    "MatMulNBits",
    1,
    Kind.CONTRACT,
    "com.microsoft",
    shapes=nbits_shapes,
    result=lambda dtypes, _: dtypes[0],
    arity=(3, 6),
    attributes={
        "K": (INT, True),
        "N": (INT, True),
        "block_size": (INT, True),
        "bits": (INT, False),
        "accuracy_level": (INT, False),
    },
)
def matmul_nbits(
    attrs: Attrs,
    x: Array,
    weight: Array,
    scales: Array,
    zero_points: Array | None = None,
    group_index: Array | None = None,
    bias: Array | None = None,
) -> Any:
    """Products of packed weights go through here where ``x`` stands for something: a source's
    hidden states in a decoder's graph, for one."""
    n, k, block, bits = attrs["N"], attrs["K"], attrs["block_size"], attrs.get("bits", 4)
    groups = -(-k // block)
    levels = unpack_rows(weight.reshape(n, -1), groups * block, bits)[:, :k].astype(np.float32)
    zeros = np.full((n, groups), 1 << (bits - 1), np.float32)
    if zero_points is not None and zero_points.dtype == np.uint8:
        zeros = unpack_rows(zero_points.reshape(n, -1), groups, bits).astype(np.float32)
    elif zero_points is not None:
        zeros = zero_points.reshape(n, groups).astype(np.float32)
    group = np.arange(k) // block if group_index is None else group_index[:k]
    w = (levels - zeros[:, group]) * scales.reshape(n, groups).astype(np.float32)[:, group]
    rows = x.reshape(-1, k).astype(np.float32)
    if attrs.get("accuracy_level", 0) == _INT8_ACTIVATIONS:
        rows = quantize_blocks(rows, block)
    y = rows @ w.T if bias is None else rows @ w.T + bias
    return y.reshape(*x.shape[:-1], n).astype(x.dtype)
