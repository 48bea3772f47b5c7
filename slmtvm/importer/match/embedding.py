"""Rows of a constant table chosen by the token become Embedding steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.cover import Cover
from slmtvm.importer.graph import Array, Constant, Node, Quantization
from slmtvm.importer.match.weights import (
    packed_weights,
    signed_zero_points,
    table_weights,
    to_signed,
)
from slmtvm.importer.steps import Embedding, Param, Weights


def match_embedding(cover: Cover, node: Node) -> Embedding:
    """A lookup by token id; raises UnsupportedOpError for lookups by anything else."""
    frame = cover.frame
    where = frame.graph.where(node)
    _check_tokens(cover, node, where)
    table = frame.small.constants[node.inputs[0]]
    if node.op_type == "GatherBlockQuantized":
        weights = _block_quantized(cover, node, table, where)
    else:
        if len(table.shape) != 2 or node.attrs.get("axis", 0) not in (0, -2):
            raise UnsupportedOpError(
                f"a lookup in a table of shape {list(table.shape)} is not supported", where=where
            )
        weights = table_weights(table, where, cover.note)
    return Embedding(weights, table.shape[0], frame.features(node.outputs[0]))


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
    _check_tokens(cover, lookup, where)
    quantization = Quantization(scales.stored, None if zeros is None else zeros.stored, 0, 0)
    quantized = replace(table, dtype=scales.dtype, quantization=quantization)
    return Embedding(table_weights(quantized, where, cover.note), *table.shape)


def _check_tokens(cover: Cover, node: Node, where: str) -> None:
    trace = cover.frame.trace(node.inputs[1])
    tokens = cover.tokens
    if trace.source != tokens or (trace.index.reshape(-1) != np.arange(trace.index.size)).any():
        raise UnsupportedOpError("looks up rows by something other than the token ids", where=where)


def _block_quantized(cover: Cover, node: Node, table: Constant, where: str) -> Weights:
    frame, attrs = cover.frame, node.attrs
    given = [frame.small.constants.get(i) if i else None for i in node.inputs]
    scales, zeros = given[2], given[3] if len(given) > 3 else None
    block, bits = attrs.get("block_size", 128), attrs.get("bits", 4)
    if scales is None or attrs.get("quantize_axis", 1) not in (1, -1):
        raise UnsupportedOpError("scales must be constants along the row", where=where)
    vocab = table.shape[0]
    dim = frame.features(node.outputs[0])
    shape = (vocab, -(-dim // block)) if block > 0 else (0, 0)
    if scales.shape != shape:
        raise InvalidModelError(
            f"scales of shape {list(scales.shape)} where {list(shape)} is needed", where=where
        )
    offsets = _offsets(zeros, shape, bits, where)
    by_group = scales.values(table=True).astype(np.float32, copy=False)
    if table.packed is not None:
        return packed_weights(table, by_group, offsets, block)
    if table.stored.dtype != np.uint8 or bits not in (4, 8):
        raise UnsupportedOpError(
            f"a quantized table of {table.dtype} with {bits} bits is not supported", where=where
        )
    if offsets is None:
        offsets = np.array(1 << (bits - 1), np.uint8)  # the default for uint8 data
    per_group = Param(scales.name, by_group)
    if bits == 8:
        stored = to_signed(table.stored, where)
        shifted = signed_zero_points(offsets, np.dtype(np.uint8), shape)
    else:
        stored = table.stored
        shifted = None if (offsets == 8).all() else np.broadcast_to(offsets, shape)
    name = table.name if zeros is None else zeros.name
    return Weights(
        f"int{bits}",
        Param(table.name, stored),
        per_group,
        None if shifted is None else Param(name, shifted),
        block,
    )


def _offsets(zeros: Constant | None, shape: tuple[int, int], bits: int, where: str) -> Array | None:
    if zeros is None:
        return None
    if zeros.packed is not None:
        values = zeros.values()
    elif bits == 4:
        stored = zeros.stored.reshape(shape[0], -1)
        values = np.stack([stored & 15, stored >> 4], axis=-1).reshape(shape[0], -1)
        values = values[:, : shape[1]]
    else:
        values = zeros.stored
    if values.shape != shape:
        raise InvalidModelError(
            f"zero points of shape {list(values.shape)} where {list(shape)} is needed",
            where=where,
        )
    return values
