"""Integer products with the rounding of their left side fixed, as products of what both stand for.

So SparseML exports layers that were trained to be quantized: a QuantizeLinear, a MatMulInteger with
a constant, perhaps an int32 bias, and one factor for both scales. Here that is a MatMul between two
DequantizeLinear, as QDQ files have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from slmtvm.importer.graph import Array, Constant, Graph, Node, needed
from slmtvm.importer.rewrite.integer_products import factors_of

_OPSET = 20  # of the nodes written


@dataclass(frozen=True)
class _Product:
    """A MatMulInteger ``node`` of what ``quantizer`` rounds, and what is added to it, if any."""

    node: Node
    quantizer: Node
    bias: Constant | None


def static_products(graph: Graph) -> Graph:
    """``graph`` with a MatMul for each MatMulInteger of a QuantizeLinear that is multiplied by
    constants."""
    if not any(node.op_type == "MatMulInteger" for node in graph.nodes):
        return graph
    makers = {name: node for node in graph.nodes for name in node.outputs}
    initializers = dict(graph.initializers)
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes += _written(node, makers, initializers) or [node]
    if len(nodes) == len(graph.nodes):
        return graph
    kept = needed(nodes, [port.name for port in graph.outputs])
    return replace(graph, nodes=kept, initializers=initializers)


def _written(
    node: Node, makers: Mapping[str, Node], initializers: dict[str, Constant]
) -> list[Node]:
    """What ``node`` becomes; nothing where it does not end such a product."""
    if node.op_type != "Mul":
        return []
    factors = factors_of(node.outputs[0], makers)
    products = {f: p for f in factors if (p := _product(f, makers, initializers))}
    if len(products) != 1:
        return []
    ((value, product),) = products.items()
    constants = [initializers.get(f) for f in factors if f != value]
    if any(c is None or not c.plain for c in constants):
        return []
    factor = np.ones((), np.float32)
    for constant in constants:
        assert constant is not None
        factor = factor * constant.values().astype(np.float32)
    weight = initializers[product.node.inputs[1]]
    own = initializers[product.quantizer.inputs[1]].values().reshape(())
    if not own or factor.size not in (1, weight.shape[-1]):
        return []
    name, result = node.name or node.outputs[0], node.outputs[0]

    def put(part: str, array: Array) -> str:
        full = f"{name}/{part}"
        initializers[full] = Constant.of(full, array)
        return full

    def op(kind: str, inputs: tuple[str, ...], output: str, **attrs: int) -> Node:
        return Node("", kind, _OPSET, f"{name}/{kind}", inputs, (output,), attrs)

    floats, restored = f"{name}/x", f"{name}/weight"
    right = _weight_numbers(product.node, initializers, factor / own)
    scale, *zero = (put(part, array) for part, array in right.items())
    made = [
        op("DequantizeLinear", (product.node.inputs[0], *product.quantizer.inputs[1:3]), floats),
        op("DequantizeLinear", (weight.name, scale, *zero), restored, axis=1),
    ]
    if product.bias is None:
        return [*made, op("MatMul", (floats, restored), result)]
    bias = put("bias", (product.bias.values() * factor.reshape(-1)).astype(np.float32))
    return [
        *made,
        op("MatMul", (floats, restored), f"{name}/product"),
        op("Add", (f"{name}/product", bias), result),
    ]


def _weight_numbers(
    product: Node, initializers: Mapping[str, Constant], scale: Array
) -> dict[str, Array]:
    """The scales and zero points of the right side, both for all of it or for each column."""
    flat = np.asarray(scale, np.float32).reshape(-1)
    zeros = product.inputs[3] if len(product.inputs) > 3 else ""
    found = initializers[zeros].stored.reshape(-1) if zeros else None
    size = max(flat.size, 1 if found is None else found.size)
    shape = (size,) if size > 1 else ()
    numbers = {"scales": np.broadcast_to(flat, (size,)).reshape(shape)}
    if found is not None:
        numbers["zero_points"] = np.broadcast_to(found, (size,)).reshape(shape)
    return {part: np.ascontiguousarray(array).reshape(shape) for part, array in numbers.items()}


def _product(
    value: str, makers: Mapping[str, Node], initializers: Mapping[str, Constant]
) -> _Product | None:
    node, bias = makers.get(value), None
    if node is not None and node.op_type == "Add":
        added = [i for i in node.inputs if i in initializers]
        if len(added) != 1 or initializers[added[0]].dtype != np.int32:
            return None
        bias = initializers[added[0]]
        node = makers.get(next(i for i in node.inputs if i != added[0]))
    if node is None or node.op_type != "MatMulInteger":
        return None
    quantizer = makers.get(node.inputs[0])
    weight = initializers.get(node.inputs[1])
    known = quantizer is not None and all(i in initializers for i in quantizer.inputs[1:])
    if quantizer is None or quantizer.op_type != "QuantizeLinear" or not known or weight is None:
        return None
    zeros = [quantizer.inputs[2:3], node.inputs[2:3]]
    left, right = ([initializers[i].stored for i in names if i] for names in zeros)
    if [a.reshape(-1).tolist() for a in left] != [b.reshape(-1).tolist() for b in right]:
        return None
    if any(i and i not in initializers for i in node.inputs[3:4]):
        return None
    one = initializers[quantizer.inputs[1]].stored.size == 1
    return _Product(node, quantizer, bias) if one and len(weight.shape) == 2 else None
