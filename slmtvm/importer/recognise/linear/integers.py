"""Products and convolutions of integers that were quantized as they came: MatMulInteger and
ConvInteger of DynamicQuantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.graph import Constant, Node, reshaped, transposed
from slmtvm.importer.operators.convolution import is_pointwise
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.linear.weights import signed_zero_points, to_signed
from slmtvm.importer.recognise.steps import Param, Weights
from slmtvm.importer.rewrite.integer_products import factors_of


@dataclass(frozen=True)
class Int8Product:
    """A MatMulInteger ``node`` with its scales, as a product of floats ``x`` and weights."""

    node: Node
    x: str
    weights: Weights
    n: int
    k: int


def int8_product(cover: Cover, value: str, makers: Mapping[str, Node]) -> Int8Product | None:
    """MatMulInteger of a DynamicQuantizeLinear result, multiplied by both scales; or such a
    ConvInteger that reads each place alone.

    The products may come in any order. ``makers``: the nodes that make the values on the way.
    """
    frame = cover.frame
    constants = frame.small.constants
    factors = factors_of(value, makers)
    product = _integer_product(factors, makers, constants, "MatMulInteger")
    if product is None:
        product = _integer_product(factors, makers, constants, "ConvInteger")
        weight = None if product is None else constants.get(product.inputs[1])
        if product is None or weight is None or not is_pointwise(product.attrs, weight.shape):
            return None
    scales = [c for v in factors if (c := constants.get(v)) is not None]
    weights = int8_weights(cover, product, scales)
    n, k = weights.weight.array.shape
    return Int8Product(product, makers[product.inputs[0]].inputs[0], weights, n, k)


def by_output(constant: Constant, where: str) -> Constant:
    """The weight of a convolution that reads each place alone as a matrix (k, n)."""
    matrix = reshaped(constant, constant.shape[:2])
    if matrix is None:
        raise UnsupportedOpError(
            f"a weight {constant.name!r} in blocks of another layout is not supported", where=where
        )
    return transposed(matrix)


def int8_weights(cover: Cover, product: Node, factors: list[Constant]) -> Weights:
    """The right side of a MatMulInteger or ConvInteger; ``factors`` are its scales."""
    where = cover.frame.graph.where(product)
    constants = cover.frame.small.constants
    constant = constants.get(product.inputs[1])
    zeros = constants.get(product.inputs[3]) if len(product.inputs) > 3 else None
    if constant is not None and product.op_type == "ConvInteger":
        constant = by_output(constant, where)
    if constant is None or len(constant.shape) != 2 or not constant.plain:
        raise UnsupportedOpError("its right side must be a constant matrix", where=where)
    n = constant.shape[1]
    scales = _product_of(factors, f"{constant.name}.scales")
    if scales.array.size not in (1, n) or (zeros is not None and zeros.stored.size not in (1, n)):
        raise UnsupportedOpError(
            "weights must have one scale and zero point, or one for each output", where=where
        )
    flat = scales.array.reshape(-1)
    if zeros is not None and zeros.stored.size > flat.size:
        flat = np.broadcast_to(flat, (n,))
    offsets = None if zeros is None else zeros.values()
    shifted = signed_zero_points(offsets, constant.stored.dtype, flat.shape)
    zero_name = f"{constant.name}.zero_points" if zeros is None else zeros.name
    return Weights(
        "int8",
        Param(constant.name, to_signed(constant.stored, where).T),
        Param(scales.name, flat),
        None if shifted is None else Param(zero_name, shifted),
    )


@dataclass(frozen=True)
class Int8Convolution:
    """A ConvInteger ``node`` with its scales, of floats ``x``; weight float32 as it restores it."""

    node: Node
    x: str
    weight: Param


def int8_convolution(cover: Cover, value: str) -> Int8Convolution | None:
    """ConvInteger of a DynamicQuantizeLinear result, multiplied by both scales."""
    makers, constants = cover.frame.producers, cover.frame.small.constants
    factors = factors_of(value, makers)
    node = _integer_product(factors, makers, constants, "ConvInteger")
    if node is None:
        return None
    constant = constants.get(node.inputs[1])
    zero = constants.get(node.inputs[3]) if len(node.inputs) > 3 else None
    if constant is None:
        raise UnsupportedOpError(
            "its weight must be a constant", where=cover.frame.graph.where(node)
        )
    scales = _product_of(
        [c for v in factors if (c := constants.get(v)) is not None], f"{constant.name}.scales"
    )
    offset = np.zeros(1, np.int32) if zero is None else zero.values().astype(np.int32)
    levels = constant.values().astype(np.int32) - offset.reshape(-1, 1, 1)
    weight = levels.astype(np.float32) * scales.array.reshape(-1, 1, 1).astype(np.float32)
    x = makers[node.inputs[0]].inputs[0]
    return Int8Convolution(node, x, Param(constant.name, weight))


def as_floats(cover: Cover, nodes: Sequence[Node]) -> tuple[list[Node], dict[str, Int8Product]]:
    """``nodes``, in order, with each product of integers as one of floats, and what it is by the
    name of its result. What only integers needed is left out."""
    makers = {o: n for n in nodes for o in n.outputs}
    found: dict[str, Int8Product] = {}
    taken: set[str] = set()
    for node in reversed(nodes):
        product = int8_product(cover, node.outputs[0], makers) if node.op_type == "Mul" else None
        is_product = product is not None and product.node.op_type == "MatMulInteger"
        if product is not None and is_product and product.node.name not in taken:
            taken.add(product.node.name)
            found[node.outputs[0]] = product
    if not found:
        return list(nodes), found
    folded = [
        Node("", "MatMul", n.version, n.name, (p.x, p.node.inputs[1]), n.outputs, {})
        if (p := found.get(n.outputs[0])) is not None
        else n
        for n in nodes
    ]
    read = {nodes[-1].outputs[0]}
    kept = []
    for node in reversed(folded):
        if read & set(node.outputs):
            kept.append(node)
            read.update(node.inputs)
    return kept[::-1], found


def _integer_product(
    factors: Sequence[str],
    makers: Mapping[str, Node],
    constants: Mapping[str, Constant],
    op_type: str,
) -> Node | None:
    """The one operator of this type among ``factors`` whose other factors undo its quantization."""
    products = [m for v in factors if (m := makers.get(v)) and m.op_type == op_type]
    if len(products) != 1:
        return None
    product = products[0]
    quantizer = makers.get(product.inputs[0])
    dynamic = [v for v in factors if v not in constants and v != product.outputs[0]]
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
