"""Products of integers that were looked up in a table: dynamic quantization leaves them as they are
where a layer reads the token table at once, as OPT-350m's and OLMo 2's do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.graph import Constant, Node, Quantization
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.linear.integers import int8_weights
from slmtvm.importer.recognise.linear.weights import table_weights
from slmtvm.importer.recognise.steps import Embedding, Linear, QuantizeDequantize, Rows
from slmtvm.importer.rewrite.integer_products import factors_of

_LEVELS = np.dtype(np.float32)


def match_int8_rows(cover: Cover, value: str) -> Linear | None:
    """MatMulInteger of rows of an int8 table, multiplied by both scales, which are constants.

    The rows are those that a DequantizeLinear makes of the table, where there is one, else the
    table's integers less their zero point; no scale of theirs is to be had then.
    """
    frame = cover.frame
    constants = frame.small.constants
    makers = frame.producers
    factors = factors_of(value, makers)
    products = [m for v in factors if (m := makers.get(v)) and m.op_type == "MatMulInteger"]
    if len(products) != 1 or products[0].inputs[0] not in frame.small.shapes:
        return None
    product = products[0]
    scales = [c for v in factors if v in constants for c in _factors_of_constant(cover, v)]
    lookup = _lookup(cover, product.inputs[0])
    if lookup is None or any(v not in constants for v in factors if v != product.outputs[0]):
        return None
    where = frame.graph.where(product)
    zero = constants.get(product.inputs[2]) if len(product.inputs) > 2 else None
    zeros = np.zeros(1, np.int64) if zero is None else zero.values().astype(np.int64).reshape(-1)
    if zeros.size != 1:
        raise UnsupportedOpError("the table must have one zero point", where=where)
    rows, unit, scales = _rows(cover, lookup, zero, scales, where)
    limits = np.iinfo(frame.small.dtypes[product.inputs[0]])
    low, high = limits.min - int(zeros[0]), limits.max - int(zeros[0])
    rounded = cover.add(f"{rows}#levels", QuantizeDequantize(rows, unit, low, high))
    weights = int8_weights(cover, product, scales)
    n, k = weights.weight.array.shape
    if frame.features(product.inputs[0]) != k or frame.features(value) != n:
        raise UnsupportedOpError("it mixes only a part of each token's features", where=where)
    return Linear(rounded, weights, None, n, k, "f32")


def _factors_of_constant(cover: Cover, name: str) -> list[Constant]:
    """What the constant ``name`` is the product of in the file, or itself."""
    graph = cover.frame.graph
    makers = {o: node for node in graph.nodes for o in node.outputs}
    factors = [graph.initializers.get(factor) for factor in factors_of(name, makers)]
    found = [factor for factor in factors if factor is not None]
    return found if len(found) == len(factors) else [cover.frame.small.constants[name]]


def _lookup(cover: Cover, value: str) -> Node | None:
    """The lookup in a table of integers that ``value`` holds as it is."""
    source, identity = cover.source(value)
    node = cover.frame.producers.get(source)
    if node is None or not identity or not cover.frame.small.is_lookup(node):
        return None
    table = cover.frame.small.constants[node.inputs[0]]
    plain = table.plain and len(table.shape) == 2 and table.stored.dtype in (np.int8, np.uint8)
    return node if plain else None


def _rows(
    cover: Cover, lookup: Node, zero: Constant | None, scales: list[Constant], where: str
) -> tuple[Rows, float, list[Constant]]:
    """The rows of the table, what their integers are multiples of, and the other scales."""
    constants = cover.frame.small.constants
    for node in cover.frame.graph.nodes:
        if node.op_type != "DequantizeLinear" or node.inputs[0] != lookup.outputs[0]:
            continue
        own = constants.get(node.inputs[1])
        places = [i for i, c in enumerate(scales) if own is not None and _equal(c, own)]
        if own is not None and own.stored.size == 1 and places:
            others = [c for i, c in enumerate(scales) if i != places[0]]
            return cover.need(node.outputs[0]), float(own.values().reshape(())), others
    table = constants[lookup.inputs[0]]
    offset = None if zero is None else zero.values().reshape(())
    unit = Quantization(np.ones((), np.float32), offset, 0, 0)
    restored = replace(table, dtype=_LEVELS, quantization=unit)
    step = Embedding(table_weights(restored, where, cover.note), table.shape[0], table.shape[1])
    return cover.add(f"{lookup.outputs[0]}#rows", step), 1.0, scales


def _equal(one: Constant, other: Constant) -> bool:
    return one.plain and other.plain and np.array_equal(one.stored, other.stored)
