"""Matrix products with a constant, plain or quantized, become Linear steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.graph import Constant, Node, reshaped, transposed
from slmtvm.importer.operators.convolution import is_pointwise
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.linear.int8_rows import match_int8_rows
from slmtvm.importer.recognise.linear.integers import by_output, int8_product
from slmtvm.importer.recognise.linear.nbits import match_nbits
from slmtvm.importer.recognise.linear.weights import linear_weights
from slmtvm.importer.recognise.steps import Linear, Param, Rows


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
    if node.op_type == "Conv":
        return _pointwise(cover, node)
    sides = [frame.small.constants.get(name) for name in node.inputs[:2]]
    if node.op_type not in ("MatMul", "Gemm") or sides.count(None) != 1:
        return None
    where = frame.graph.where(node)
    on_left = sides[1] is None
    constant = _matrix(sides[0] if on_left else sides[1], where)
    # A constant on the left gives a column for each token: the product, and both sides, transposed.
    turned = bool(node.attrs.get("transA" if on_left else "transB", 0))
    constant = constant if turned == on_left else transposed(constant)
    k, n = constant.shape
    bias: Param | None = None
    if node.op_type == "Gemm":
        if node.attrs.get("alpha", 1.0) != 1.0:
            raise UnsupportedOpError("Gemm with alpha is not supported", where=where)
        if len(node.inputs) > 2 and node.inputs[2]:
            added = frame.small.constants.get(node.inputs[2])
            if on_left and added is not None and added.shape[-1:] not in ((), (1,)):
                raise UnsupportedOpError("a bias for each token is not supported", where=where)
            bias = cover.vector(node.inputs[2], n, node.attrs.get("beta", 1.0), where)
    rows = rows_of_product(cover, node, node.inputs[on_left], k, n)
    return Linear(rows, linear_weights(constant, where, cover.note), bias, n, k, "f32")


def _pointwise(cover: Cover, node: Node) -> Linear | None:
    """A convolution that reads each place alone: the linear layer of its channels."""
    where = cover.frame.graph.where(node)
    constant = cover.frame.small.constants.get(node.inputs[1])
    if constant is None or not is_pointwise(node.attrs, constant.shape):
        return None
    n, k = constant.shape[:2]
    rows = rows_of_product(cover, node, node.inputs[0], k, n)
    bias: Param | None = None
    if len(node.inputs) > 2 and node.inputs[2]:
        bias = cover.vector(node.inputs[2], n, 1.0, where)
    weights = linear_weights(by_output(constant, where), where, cover.note)
    return Linear(rows, weights, bias, n, k, "f32")


def _matrix(constant: Constant | None, where: str) -> Constant:
    """One side of a product, which may have a batch of one."""
    assert constant is not None
    shape = constant.shape
    if len(shape) > 2 and set(shape[:-2]) == {1}:
        constant = reshaped(constant, shape[-2:]) or constant
    if len(constant.shape) != 2:
        raise UnsupportedOpError(
            f"a product with a constant of shape {list(constant.shape)} is not supported",
            where=where,
        )
    return constant


def rows_of_product(cover: Cover, node: Node, x: str, k: int, n: int) -> Rows:
    """The rows ``x`` that a product reads; checks that each token gives one row of it."""
    y = node.outputs[0]
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
        return match_int8_rows(cover, value)
    if frame.features(found.x) != found.k or frame.features(value) != found.n:
        raise UnsupportedOpError(
            "it mixes only a part of each token's features", where=frame.graph.where(found.node)
        )
    return Linear(cover.need(found.x), found.weights, None, found.n, found.k, "row_u8")


def _linear_at(cover: Cover, value: str) -> Linear | None:
    node = cover.frame.producers.get(value)
    if node is None:
        return None
    return match_int8_linear(cover, value) if node.op_type == "Mul" else match_linear(cover, node)


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
    linear = _linear_at(cover, source)
    if linear is None or linear.bias is not None:
        return None
    (other,) = (i for i in node.inputs if i != dynamic[0])
    bias = cover.constant_operand(other, value)
    if isinstance(bias, float):
        bias = Param(f"{value}.bias", np.full(linear.n, bias, np.float32))
    if not isinstance(bias, Param) or bias.array.shape != (linear.n,):
        return None
    return replace(linear, bias=bias)
