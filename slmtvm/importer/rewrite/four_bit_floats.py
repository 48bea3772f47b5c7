"""MatMulBnb4, products with weights in bitsandbytes' types of 4 bits: with their float32 values.

No kernel reads these types, whose 16 values are not evenly spaced.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.graph import Array, Constant, Graph, Node
from slmtvm.importer.operators.four_bit_floats import TABLES, four_bit_floats

OPERATOR = "MatMulBnb4"


def expand_four_bit_floats(graph: Graph) -> Graph:
    """``graph`` with a MatMul for each MatMulBnb4."""
    if not any(node.op_type == OPERATOR for node in graph.nodes):
        return graph
    initializers = dict(graph.initializers)
    nodes = tuple(
        _product(graph, node, initializers) if node.op_type == OPERATOR else node
        for node in graph.nodes
    )
    return replace(graph, nodes=nodes, initializers=initializers)


def _product(graph: Graph, node: Node, initializers: dict[str, Constant]) -> Node:
    where = graph.where(node)
    x, *names = node.inputs
    weight, magnitudes = (graph.initializers.get(name) for name in names)
    if weight is None or magnitudes is None:
        raise UnsupportedOpError("all its inputs but the first must be constants", where=where)
    name = f"{weight.name}.{node.name or node.outputs[0]}"
    initializers[name] = replace(
        Constant.of(name, _matrix(node, weight, magnitudes, where)), narrow=weight.stored.nbytes
    )
    return Node("", "MatMul", 1, node.name, (x, name), node.outputs, {})


def _matrix(node: Node, weight: Constant, magnitudes: Constant, where: str) -> Array:
    """The right side of the product, float32 (K, N)."""
    n, k, block = (node.attrs[name] for name in ("N", "K", "block_size"))
    kind = node.attrs["quant_type"]
    if kind not in range(len(TABLES)) or block <= 0 or node.attrs.get("transB", 1) != 1:
        raise UnsupportedOpError(
            f"quant_type {kind} in blocks of {block}, transB {node.attrs.get('transB', 1)}; FP4 "
            "(0) and NF4 (1) in blocks, of the transposed matrix, are supported",
            where=where,
        )
    packed, largest = weight.stored.reshape(-1), magnitudes.stored.reshape(-1)
    bytes_needed, blocks = -(-n * k // 2), -(-n * k // block)
    if weight.stored.dtype != np.uint8 or packed.size != bytes_needed:
        raise InvalidModelError(
            f"weight {weight.name!r} of {packed.size} {weight.stored.dtype} where N={n}, K={k} "
            f"need {bytes_needed} bytes",
            where=where,
        )
    if largest.dtype.kind != "f" or largest.size != blocks:
        raise InvalidModelError(
            f"{largest.size} {largest.dtype} magnitudes where {blocks} floats are needed",
            where=where,
        )
    return four_bit_floats(packed, largest, node.attrs).T
