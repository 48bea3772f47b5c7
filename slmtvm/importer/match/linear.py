"""Matrix products with a constant, plain or quantized, become Linear steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.cover import Cover
from slmtvm.importer.graph import Node, transposed
from slmtvm.importer.match.integers import int8_product
from slmtvm.importer.match.nbits import match_nbits
from slmtvm.importer.match.weights import linear_weights
from slmtvm.importer.steps import Linear, Param, Rows


def match_linear(cover: Cover, node: Node) -> Linear | None:
    """``node`` as a Linear step, or None where its right side is not a constant."""
    frame = cover.frame
    if node.op_type == "MatMulNBits":
        return match_nbits(cover, node)
    if node.op_type == "MatMulInteger":
        raise UnsupportedOpError(
            "an integer product is supported only where its left side and zero point come from one "
            "DynamicQuantizeLinear and its result is multiplied by that one's scale",
            where=frame.graph.where(node),
        )
    if node.op_type not in ("MatMul", "Gemm") or node.inputs[0] not in frame.small.shapes:
        return None
    constant = frame.small.constants.get(node.inputs[1])
    if constant is None:
        return None
    where = frame.graph.where(node)
    bias: Param | None = None
    if node.op_type == "Gemm":
        if node.attrs.get("transA", 0) or node.attrs.get("alpha", 1.0) != 1.0:
            raise UnsupportedOpError("Gemm with transA or alpha is not supported", where=where)
        if node.attrs.get("transB", 0):
            constant = transposed(constant)
        if len(node.inputs) > 2 and node.inputs[2]:
            n = constant.shape[1]
            bias = cover.vector(node.inputs[2], n, node.attrs.get("beta", 1.0), where)
    if len(constant.shape) == 3 and constant.shape[0] == 1 and constant.packed is None:
        constant = replace(constant, stored=constant.stored[0])
    if len(constant.shape) != 2:
        raise UnsupportedOpError(
            f"a product with a constant of shape {list(constant.shape)} is not supported",
            where=where,
        )
    k, n = constant.shape
    return Linear(
        _rows(cover, node, k, n), linear_weights(constant, where, cover.note), bias, n, k, "f32"
    )


def _rows(cover: Cover, node: Node, k: int, n: int) -> Rows:
    """The rows that a product reads; checks that each token gives one row of it."""
    x, y = node.inputs[0], node.outputs[0]
    frame = cover.frame
    if frame.features(x) != k or frame.features(y) != n:
        raise UnsupportedOpError(
            "a matrix product that mixes only a part of each token's features is not supported",
            where=frame.graph.where(node),
        )
    return cover.need(x)


def match_int8_linear(cover: Cover, value: str) -> Linear | None:
    """A product of integers and both scales as a Linear step.

    The quantization of the whole tensor becomes one of each row: what the file computes for a
    single token, and finer for several.
    """
    frame = cover.frame
    found = int8_product(cover, value, frame.producers)
    if found is None:
        return None
    if frame.features(found.x) != found.k or frame.features(value) != found.n:
        raise UnsupportedOpError(
            "it mixes only a part of each token's features", where=frame.graph.where(found.node)
        )
    return Linear(cover.need(found.x), found.weights, None, found.n, found.k, "row_u8")


def with_bias(cover: Cover, value: str) -> Linear | None:
    """``linear + vector`` as one Linear, where nothing else reads the linear's result."""
    frame = cover.frame
    node = frame.producers[value]
    dynamic = frame.dynamic(node)
    if node.op_type != "Add" or len(dynamic) != 1:
        return None
    source, identity = cover.source(dynamic[0])
    if not identity or frame.users.get(source, 0) != 1:
        return None
    linear = cover.linear_at(source)
    if linear is None or linear.bias is not None:
        return None
    (other,) = (i for i in node.inputs if i != dynamic[0])
    bias = cover.constant_operand(other, value)
    if isinstance(bias, float):
        bias = Param(f"{value}.bias", np.full(linear.n, bias, np.float32))
    if not isinstance(bias, Param) or bias.array.shape != (linear.n,):
        return None
    return replace(linear, bias=bias)
