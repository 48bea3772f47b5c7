"""Products of two activations that are quantized as they come, as products of floats.

Dynamic quantization with every option rounds queries, keys, probabilities and values too, each with
the range of the whole tensor, and multiplies integers. Here that is a MatMul of what is rounded,
whose attribute ``rounds_sides`` says that the file rounds both of its sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from slmtvm.importer.graph import Graph, Node
from slmtvm.importer.operators.elementwise import FLOAT_TYPES

ROUNDS_SIDES = "rounds_sides"
_MAX_FACTORS = 16
_QUANTIZER, _PRODUCT = "DynamicQuantizeLinear", "MatMulInteger"


def products_of_floats(graph: Graph) -> Graph:
    """``graph`` with a MatMul for each MatMulInteger of two DynamicQuantizeLinear results that is
    multiplied by both scales."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    pairs = {
        node.outputs[0]
        for node in graph.nodes
        if node.op_type == _PRODUCT and _sides(node, makers) is not None
    }
    if not pairs:
        return graph
    return replace(graph, nodes=tuple(_of_floats(node, makers, pairs) for node in graph.nodes))


def _of_floats(node: Node, makers: Mapping[str, Node], pairs: set[str]) -> Node:
    if node.op_type != "Mul":
        return node
    factors = factors_of(node.outputs[0], makers)
    products = pairs.intersection(factors)
    if len(products) != 1:
        return node
    (product,) = products
    sides = _sides(makers[product], makers)
    assert sides is not None
    scales = sorted(side.outputs[1] for side in sides)
    if sorted(f for f in factors if f != product) != scales:
        return node
    inputs = tuple(side.inputs[0] for side in sides)
    return Node("", "MatMul", node.version, node.name, inputs, node.outputs, {ROUNDS_SIDES: 1})


def _sides(product: Node, makers: Mapping[str, Node]) -> tuple[Node, Node] | None:
    """What quantizes both sides of ``product``, with the zero points that it subtracts."""
    found = [makers.get(name) for name in product.inputs[:2]]
    left, right = found
    if left is None or right is None or len(product.inputs) < 4:
        return None
    quantized = all(
        side.op_type == _QUANTIZER and side.outputs[2] == zero
        for side, zero in zip((left, right), product.inputs[2:], strict=True)
    )
    return (left, right) if quantized else None


def factors_of(value: str, makers: Mapping[str, Node]) -> list[str]:
    """The values whose product ``value`` is, seen through casts."""
    factors: list[str] = []
    todo = [value]
    while todo:
        name = todo.pop()
        node = makers.get(name)
        small = len(factors) + len(todo) < _MAX_FACTORS
        if node is not None and node.op_type == "Mul" and small:
            todo.extend(node.inputs)
        elif node is not None and node.op_type == "Cast" and node.attrs["to"] in FLOAT_TYPES:
            todo.append(node.inputs[0])
        else:
            factors.append(name)
    return factors
