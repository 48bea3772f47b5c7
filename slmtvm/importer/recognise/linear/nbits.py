"""MatMulNBits: products with weights of 2, 4 or 8 bits in blocks along k.

Its operands are described in onnxruntime's docs/ContribOperators.md; what onnxruntime's CPU kernel
computes of them was found by running it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.graph import Array, Constant, Node
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.linear.weights import (
    SCALE_BYTES,
    kernel_groups,
    signed_zero_points,
    to_signed,
)
from slmtvm.importer.recognise.steps import Elementwise, Linear, Param, Reordered, Rows, Weights
from slmtvm.schedules.linear.packed_rows import pack_rows, unpack_rows
from slmtvm.schedules.linear.shape import GROUP_SIZES

_INT8_ACTIVATIONS = 4  # the accuracy_level that asks for them
_MIN_BLOCK = 16
_BITS = (2, 4, 8)


@dataclass(frozen=True)
class BlockLayer:
    """What a node computes: its weights as in the file, and how activations are held."""

    weights: Weights
    bias: Param | None
    n: int
    k: int
    activation: str
    group_index: Constant | None


def match_nbits(cover: Cover, node: Node) -> Linear:
    """``node`` as a Linear step; raises where its operands do not fit."""
    layer = block_layer(cover, node)
    weights, n, k = layer.weights, layer.n, layer.k
    x = _rows(cover, node, k, n)
    if layer.group_index is not None:
        x, weights, k = _ordered(cover, node, x, weights, layer.group_index)
    weights = kernel_groups(weights, k, cover.note)
    return Linear(x, weights, layer.bias, n, k, layer.activation)


def block_layer(cover: Cover, node: Node) -> BlockLayer:
    """The operands of ``node``; raises where they do not fit each other."""
    frame, attrs = cover.frame, node.attrs
    where = frame.graph.where(node)
    n, k = attrs["N"], attrs["K"]
    bits, block = attrs.get("bits", 4), attrs["block_size"]
    if bits not in _BITS or block < _MIN_BLOCK or block & (block - 1):
        raise UnsupportedOpError(
            f"MatMulNBits of {bits} bits in blocks of {block}; 2, 4 and 8 bits in blocks of a "
            f"power of two from {_MIN_BLOCK} on are supported",
            where=where,
        )
    given = [frame.small.constants.get(i) if i else None for i in node.inputs]
    given += [None] * (6 - len(given))
    if any(name and c is None for name, c in zip(node.inputs[1:], given[1:], strict=False)):
        raise UnsupportedOpError("all its inputs but the first must be constants", where=where)
    _, weight, scales, zeros, group_index, bias = given
    assert weight is not None and scales is not None
    groups = -(-k // block)
    if scales.stored.size != n * groups or scales.dtype.kind in "iub":
        raise InvalidModelError(
            f"{scales.stored.size} scales where {n * groups} are needed", where=where
        )
    packed = _packed(weight, n, k, bits, groups * block, where)
    offsets = _zero_points(zeros, n, groups, bits, where)
    weights = Weights(
        f"int{bits}",
        Param(weight.name, packed),
        Param(scales.name, scales.values(table=True).reshape(n, groups).astype(np.float32)),
        None if offsets is None else Param(weight.name if zeros is None else zeros.name, offsets),
        block,
    )
    # With float zero points or g_idx onnxruntime computes with float activations at every level.
    floats = group_index is not None or (offsets is not None and offsets.dtype.kind == "f")
    asked = attrs.get("accuracy_level", 0) == _INT8_ACTIVATIONS and not floats
    vector = None if bias is None else cover.vector(node.inputs[5], n, 1.0, where)
    return BlockLayer(weights, vector, n, k, "block" if asked else "f32", group_index)


def _rows(cover: Cover, node: Node, k: int, n: int) -> Rows:
    x, y = node.inputs[0], node.outputs[0]
    if cover.frame.features(x) != k or cover.frame.features(y) != n:
        raise UnsupportedOpError(
            "a matrix product that mixes only a part of each token's features is not supported",
            where=cover.frame.graph.where(node),
        )
    return cover.need(x)


def _packed(weight: Constant, n: int, k: int, bits: int, padded: int, where: str) -> Array:
    """The weight as ``ir.ops.linear`` has integer ones, without the padding."""
    row_bytes = padded * bits // 8
    if not weight.plain or weight.stored.dtype != np.uint8 or weight.stored.size != n * row_bytes:
        raise InvalidModelError(
            f"weight {weight.name!r} of shape {list(weight.shape)} where N={n}, K={k} need "
            f"{n * row_bytes} bytes",
            where=where,
        )
    rows = weight.stored.reshape(n, row_bytes)[:, : (k * bits + 7) // 8]
    if bits == 8:
        return to_signed(rows, where)  # 128, the default zero point, becomes 0
    return rows


def _zero_points(
    zeros: Constant | None, n: int, groups: int, bits: int, where: str
) -> Array | None:
    """(n, groups) for the values of ``_packed``: uint8 or int8, or float32; None where default."""
    if zeros is None:
        return None
    shift = -128 if bits == 8 else 0  # as ``to_signed`` shifts the values
    if zeros.dtype.kind not in "iub":
        if zeros.stored.size != n * groups:
            raise InvalidModelError(
                f"{zeros.stored.size} float zero points where {n * groups} are needed", where=where
            )
        return zeros.values(table=True).reshape(n, groups).astype(np.float32) + np.float32(shift)
    if zeros.stored.dtype != np.uint8 or not zeros.plain:
        raise UnsupportedOpError(
            f"zero points of type {zeros.dtype}; packed uint8 ones and floats are supported",
            where=where,
        )
    width = -(-groups * bits // 8)
    if zeros.stored.size != n * width:
        raise InvalidModelError(
            f"{zeros.stored.size} bytes of zero points where {n * width} are needed", where=where
        )
    rows = zeros.stored.reshape(n, width)
    if bits == 8:
        return signed_zero_points(rows, np.dtype(np.uint8), (n, groups))
    values = unpack_rows(rows, groups, bits)
    return None if (values == 1 << (bits - 1)).all() else values


def _ordered(
    cover: Cover, node: Node, x: Rows, weights: Weights, index: Constant
) -> tuple[Rows, Weights, int]:
    """Columns of the weight, and with them the features of x, in an order that makes every group
    contiguous; groups that are not full are filled up with columns that add nothing. Returns x,
    the weights and the number of columns."""
    where = cover.frame.graph.where(node)
    n, k, block = node.attrs["N"], node.attrs["K"], node.attrs["block_size"]
    groups = -(-k // block)
    group = index.values(table=True).reshape(-1)
    if group.dtype.kind not in "iu" or group.size < k or not group[:k].min() >= 0:
        raise InvalidModelError(f"g_idx {index.name!r} must hold {k} group numbers", where=where)
    group = group[:k].astype(np.int64)
    if group.max() >= groups:
        raise InvalidModelError(f"g_idx {index.name!r} names group {group.max()}", where=where)
    given = len(node.inputs) > 3 and node.inputs[3]
    if given and weights.zero_points is not None and weights.zero_points.array.dtype != "f4":
        cover.note(
            "MatMulNBits with packed zero points and g_idx: onnxruntime's CPU kernel ignores the "
            "zero points, slmtvm does not"
        )
    if weights.bits == 2:
        cover.note(
            "MatMulNBits of 2 bits and g_idx: onnxruntime's CPU kernel reads the bytes as values "
            "of 4 bits, slmtvm does not"
        )
    if (group == np.arange(k) // block).all():
        return x, weights, k
    size, features, real, of = _regrouped(group, groups, weights.bits)
    stored = weights.weight.array
    values = unpack_rows(stored, k, weights.bits)[:, features]
    assert weights.scales is not None
    scales, zeros = weights.scales.array[:, of], weights.zero_points
    offsets = zeros.array[:, of] if zeros else np.full((1, of.size), weights.default_zero)
    floats = offsets.dtype.kind == "f"
    if not floats:  # else x is zero there
        values = np.where(real, values, np.repeat(offsets, size, axis=1).astype(values.dtype))
    ordered = Weights(
        weights.format,
        Param(weights.weight.name, pack_rows(values, weights.bits)),
        Param(weights.scales.name, scales),
        None if zeros is None else Param(zeros.name, offsets),
        size,
    )
    assert n == len(scales)
    return _gathered(cover, x, features, real if floats else None), ordered, features.size


def _regrouped(group: Array, groups: int, bits: int) -> tuple[int, Array, Array, Array]:
    """Columns that belong to these groups in groups of one size that kernels have.

    Returns that size, the columns in their new order, which of them are real (the others repeat one
    of their group, so that it has the same range), and the old group that each new one is of.
    """
    counts = np.bincount(group, minlength=groups)

    def needed(size: int) -> int:
        return int((-(-counts // size)).sum()) * (size * bits // 8 + SCALE_BYTES)

    size = min(GROUP_SIZES[::-1], key=needed)
    parts = -(-counts // size)
    of = np.repeat(np.arange(groups), parts)
    # The place of each column: its group's first, and its number in that.
    sorted_columns = np.argsort(group, kind="stable")
    starts = np.cumsum(parts * size) - parts * size
    rank = np.arange(group.size) - np.repeat(np.cumsum(counts) - counts, counts)
    places = starts[group[sorted_columns]] + rank
    real = np.zeros(len(of) * size, bool)
    real[places] = True
    filled = np.maximum.accumulate(np.where(real, np.arange(real.size), 0))
    features = np.zeros(real.size, np.int64)
    features[places] = sorted_columns
    return size, features[filled], real, of


def _gathered(cover: Cover, x: Rows, features: Array, real: Array | None) -> Rows:
    """Features of x in another order, zeros where they are not ``real``; layers that read x in one
    order share it."""
    rows = cover.add(f"{x}#order", Reordered(x, Param(f"{x}.order", features.astype(np.int32))))
    if real is None or real.all():
        return rows
    mask = Param(f"{x}.real", real.astype(np.float32))
    return cover.add(f"{rows}#real", Elementwise("multiply", (rows, mask)))
