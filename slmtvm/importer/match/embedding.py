"""Rows of a constant table chosen by the token become Embedding steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.cover import Cover
from slmtvm.importer.graph import Array, Constant, Node, Quantization
from slmtvm.importer.match.weights import signed_zero_points, table_weights, to_signed
from slmtvm.importer.steps import Embedding, Param, Weights
from slmtvm.schedules.linear.packed_rows import unpack_rows

_BITS = (2, 4, 8)  # of values in bytes


def match_embedding(cover: Cover, node: Node) -> Embedding:
    """A lookup by token id or token type; raises UnsupportedOpError for those by anything else."""
    frame = cover.frame
    where = frame.graph.where(node)
    by_segment = _by_segment(cover, node, where)
    table = frame.small.constants[node.inputs[0]]
    if node.op_type == "GatherBlockQuantized":
        weights = _block_quantized(cover, node, table, where)
    else:
        if len(table.shape) != 2 or node.attrs.get("axis", 0) not in (0, -2):
            raise UnsupportedOpError(
                f"a lookup in a table of shape {list(table.shape)} is not supported", where=where
            )
        weights = table_weights(table, where, cover.note)
    return Embedding(weights, table.shape[0], frame.features(node.outputs[0]), by_segment)


def match_dequantized_rows(cover: Cover, value: str) -> Embedding | None:
    """DequantizeLinear of rows looked up in an int8 table."""
    frame = cover.frame
    node = frame.producers[value]
    if node.op_type != "DequantizeLinear" or node.inputs[0] not in frame.small.shapes:
        return None
    source, identity = cover.source(node.inputs[0])
    lookup = frame.producers.get(source)
    if lookup is None or not identity or not frame.small.is_lookup(lookup):
        return None
    where = frame.graph.where(node)
    given = [frame.small.constants.get(i) if i else None for i in node.inputs[1:]]
    scales, zeros = given[0], given[1] if len(given) > 1 else None
    table = frame.small.constants[lookup.inputs[0]]
    single = scales is not None and scales.stored.size == 1
    single = single and (zeros is None or zeros.stored.size == 1)
    if scales is None or not single or not table.plain or len(table.shape) != 2:
        raise UnsupportedOpError(
            "rows looked up in a quantized table need one scale and zero point for the whole table",
            where=where,
        )
    by_segment = _by_segment(cover, lookup, where)
    quantization = Quantization(scales.stored, None if zeros is None else zeros.stored, 0, 0)
    quantized = replace(table, dtype=scales.dtype, quantization=quantization)
    rows, features = table.shape
    return Embedding(table_weights(quantized, where, cover.note), rows, features, by_segment)


def _by_segment(cover: Cover, node: Node, where: str) -> bool:
    """Whether ``node`` looks up by token type, not by token id."""
    trace = cover.frame.trace(node.inputs[1])
    known = (cover.tokens, cover.segments)
    moved = (trace.index.reshape(-1) != np.arange(trace.index.size)).any()
    if trace.source not in known or moved:
        raise UnsupportedOpError("looks up rows by something other than the token ids", where=where)
    return trace.source != cover.tokens


def _block_quantized(cover: Cover, node: Node, table: Constant, where: str) -> Weights:
    frame, attrs = cover.frame, node.attrs
    given = [frame.small.constants.get(i) if i else None for i in node.inputs]
    scales, zeros = given[2], given[3] if len(given) > 3 else None
    block, bits, axis = (
        attrs.get("block_size", 128), attrs.get("bits", 4), attrs.get("quantize_axis", 1) % 2,
    )  # fmt: skip
    if scales is None:
        raise UnsupportedOpError("scales must be constants", where=where)
    size = [table.shape[0], frame.features(node.outputs[0])]
    size[axis] = -(-size[axis] // block) if block > 0 else 0
    shape = (size[0], size[1])
    if scales.shape != shape:
        raise InvalidModelError(
            f"scales of shape {list(scales.shape)} where {list(shape)} is needed", where=where
        )
    offsets = _offsets(zeros, shape, bits, where)
    by_block = scales.values(table=True)
    if table.packed is not None:
        quantization = Quantization(by_block, offsets, axis, block)
        return table_weights(replace(table, quantization=quantization), where, cover.note)
    if table.stored.dtype != np.uint8 or bits not in _BITS or axis != 1:
        raise UnsupportedOpError(
            f"a quantized table of {table.dtype} with {bits} bits in blocks along axis {axis} is "
            "not supported",
            where=where,
        )
    if offsets is None:
        offsets = np.array(1 << (bits - 1), np.uint8)  # the default for uint8 data
    if bits == 8:
        stored = to_signed(table.stored, where)
        shifted = signed_zero_points(offsets, np.dtype(np.uint8), shape)
    else:
        stored = table.stored
        default = (offsets == 1 << (bits - 1)).all()
        shifted = None if default else np.broadcast_to(offsets, shape)
    name = table.name if zeros is None else zeros.name
    return Weights(
        f"int{bits}",
        Param(table.name, stored),
        Param(scales.name, by_block.astype(np.float32, copy=False)),
        None if shifted is None else Param(name, shifted),
        block,
    )


def _offsets(zeros: Constant | None, shape: tuple[int, int], bits: int, where: str) -> Array | None:
    if zeros is None:
        return None
    values = zeros.values(table=True)
    if zeros.packed is None and bits < 8:
        values = unpack_rows(values.reshape(shape[0], -1), shape[1], bits)
    if values.shape != shape:
        raise InvalidModelError(
            f"zero points of shape {list(values.shape)} where {list(shape)} is needed",
            where=where,
        )
    return values
