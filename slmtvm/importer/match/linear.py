"""Matrix products with a constant, plain or quantized, become Linear steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.cover import Cover
from slmtvm.importer.graph import Constant, Node, transposed
from slmtvm.importer.match.nbits import match_nbits
from slmtvm.importer.match.weights import int8_zero_points, linear_weights, to_int8
from slmtvm.importer.steps import Linear, Param, Rows, Weights

_MAX_FACTORS = 16


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
    """MatMulInteger of a DynamicQuantizeLinear result, multiplied by both scales.

    The products may come in any order. The quantization of the whole tensor becomes one of each
    row: what the file computes for a single token, and finer for several.
    """
    frame = cover.frame
    factors = _factors(cover, value)
    product = _integer_product(cover, factors)
    if product is None:
        return None
    where = frame.graph.where(product)
    constant = frame.small.constants.get(product.inputs[1])
    zeros = frame.small.constants.get(product.inputs[3]) if len(product.inputs) > 3 else None
    if constant is None or len(constant.shape) != 2 or not constant.plain:
        raise UnsupportedOpError("its right side must be a constant matrix", where=where)
    k, n = constant.shape
    scales = _product_of(
        [c for v in factors if (c := frame.small.constants.get(v)) is not None],
        f"{constant.name}.scales",
    )
    if scales.array.size not in (1, n) or (zeros is not None and zeros.stored.size not in (1, n)):
        raise UnsupportedOpError(
            "weights must have one scale and zero point, or one for each output", where=where
        )
    flat = scales.array.reshape(-1)
    if zeros is not None and zeros.stored.size > flat.size:
        flat = np.broadcast_to(flat, (n,))
    offsets = None if zeros is None else zeros.values()
    shifted = int8_zero_points(offsets, constant.stored.dtype == np.uint8, flat.shape)
    zero_name = f"{constant.name}.zero_points" if zeros is None else zeros.name
    weights = Weights(
        "int8",
        Param(constant.name, to_int8(constant.stored, where).T),
        Param(scales.name, flat),
        None if shifted is None else Param(zero_name, shifted),
    )
    x = frame.producers[product.inputs[0]].inputs[0]
    if frame.features(x) != k or frame.features(value) != n:
        raise UnsupportedOpError("it mixes only a part of each token's features", where=where)
    return Linear(cover.need(x), weights, None, n, k, "row_u8")


def _integer_product(cover: Cover, factors: list[str]) -> Node | None:
    """The one MatMulInteger among ``factors`` whose other factors undo its quantization."""
    frame = cover.frame
    makers = [frame.producers.get(v) for v in factors]
    products = [m for m in makers if m is not None and m.op_type == "MatMulInteger"]
    if len(products) != 1:
        return None
    product = products[0]
    quantizer = frame.producers.get(product.inputs[0])
    dynamic = [v for v in factors if v in frame.small.shapes and v != product.outputs[0]]
    zero = product.inputs[2] if len(product.inputs) > 2 else ""
    if (
        quantizer is None
        or quantizer.op_type != "DynamicQuantizeLinear"
        or dynamic != [quantizer.outputs[1]]
        or zero != quantizer.outputs[2]
    ):
        return None
    return product


def _product_of(constants: list[Constant], name: str) -> Param:
    """A constant as it is, or the product of several in float32."""
    if len(constants) == 1:
        return Param(constants[0].name, constants[0].values())
    total = np.ones((), np.float32)
    for constant in constants:
        total = total * constant.values()
    return Param(name, total.astype(np.float32))


def _factors(cover: Cover, value: str) -> list[str]:
    """The values whose product ``value`` is, seen through casts."""
    frame = cover.frame
    factors: list[str] = []
    todo = [value]
    while todo:
        name = todo.pop()
        node = frame.producers.get(name)
        small = len(factors) + len(todo) < _MAX_FACTORS
        if node is not None and node.op_type == "Mul" and small:
            todo.extend(node.inputs)
        elif node is not None and node.op_type == "Cast":
            todo.append(node.inputs[0])
        else:
            factors.append(name)
    return factors


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
