"""Rows of a constant table chosen by the token become Embedding steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.frame.frame import Trace, uniform
from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.graph import Array, Constant, Node, Quantization, unpack_nibbles
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.evidence.regions import between, evaluate
from slmtvm.importer.recognise.linear.weights import signed_zero_points, table_weights, to_signed
from slmtvm.importer.recognise.steps import Embedding, Param, Weights
from slmtvm.schedules.linear.packed_rows import unpack_rows

_BITS = (2, 4, 8)  # of values in bytes


def match_embedding(cover: Cover, node: Node) -> Embedding:
    """A lookup by token id or token type; raises UnsupportedOpError for those by anything else."""
    frame = cover.frame
    where = frame.graph.where(node)
    by, first = _looked_up_by(cover, node, where)
    table = frame.small.constants[node.inputs[0]]
    if node.op_type == "GatherBlockQuantized":
        weights = _block_quantized(cover, node, table, where)
    else:
        if len(table.shape) != 2 or node.attrs.get("axis", 0) not in (0, -2):
            raise UnsupportedOpError(
                f"a lookup in a table of shape {list(table.shape)} is not supported", where=where
            )
        weights = table_weights(table, where, cover.note)
    return Embedding(weights, table.shape[0], frame.features(node.outputs[0]), by, first)


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
    by, first = _looked_up_by(cover, lookup, where)
    quantization = Quantization(scales.stored, None if zeros is None else zeros.stored, 0, 0)
    quantized = replace(table, dtype=scales.dtype, quantization=quantization)
    rows, features = table.shape
    return Embedding(table_weights(quantized, where, cover.note), rows, features, by, first)


def match_restored_rows(cover: Cover, value: str) -> Embedding | None:
    """Integers looked up in a table, less a zero point and times a scale, both of which are
    constants or looked up by the same tokens."""
    node = cover.frame.producers[value]
    if node.op_type != "Mul":
        return None
    for levels, factor in (node.inputs, node.inputs[::-1]):
        found = _levels(cover, levels)
        if found is None:
            continue
        lookup, zeros = found
        table = cover.frame.small.constants[lookup.inputs[0]]
        scales = _by_row(cover, factor, table)
        if scales is None or len(table.shape) != 2:
            continue
        where = cover.frame.graph.where(node)
        _check_tokens(cover, lookup, where)
        restored = _restored(scales, zeros, table)
        return Embedding(table_weights(restored, where, cover.note), table.shape[0], table.shape[1])
    return None


_PerRow = tuple[Array, int]  # () or a vector, and the axis of the table that it belongs to


def _levels(cover: Cover, value: str) -> tuple[Node, _PerRow | None] | None:
    """The lookup of integers that ``value`` is, as floats, and what was subtracted from them."""
    if value not in cover.frame.small.shapes:
        return None
    node = _maker(cover, value)
    if node is None:
        return None
    if node.op_type == "Sub":
        found = _levels(cover, node.inputs[0])
        if found is None or found[1] is not None:
            return None
        lookup, _ = found
        zeros = _by_row(cover, node.inputs[1], cover.frame.small.constants[lookup.inputs[0]])
        return None if zeros is None else (lookup, zeros)
    if node.op_type != "Gather" or not cover.frame.small.is_lookup(node):
        return None
    table = cover.frame.small.constants[node.inputs[0]]
    narrow = table.packed is not None or table.stored.dtype in (np.int8, np.uint8)
    return (node, None) if narrow and table.quantization is None else None


def _by_row(cover: Cover, name: str, table: Constant) -> _PerRow | None:
    """What all of ``table``'s rows have, each of its columns, or each of its rows (looked up)."""
    constant = cover.frame.small.constants.get(name)
    if constant is not None:
        values = constant.values().reshape(-1)
        if values.size == 1:
            return values.reshape(()), 0
        return (values, 1) if constant.shape[-1:] == table.shape[1:] == values.shape else None
    node = _maker(cover, name)
    if node is None or not cover.frame.small.is_lookup(node) or node.op_type != "Gather":
        return None
    _check_tokens(cover, node, cover.frame.graph.where(node))
    values = cover.frame.small.constants[node.inputs[0]].values(table=True)
    return (values.reshape(-1), 0) if values.size == table.shape[0] else None


def _restored(scales: _PerRow, zeros: _PerRow | None, table: Constant) -> Constant:
    """``table`` with its scales and zero points; in float where no quantization has them so."""
    quantization = _restoring(scales, zeros, table)
    if quantization is not None:
        return replace(table, dtype=np.dtype(np.float32), quantization=quantization)
    stored = table.stored if table.packed is None else unpack_nibbles(table)

    def wide(per: _PerRow) -> Array:
        values, axis = per
        return values.astype(np.float32).reshape([-1, 1] if axis == 0 else [1, -1])

    assert zeros is not None
    values = (stored.astype(np.float32) - wide(zeros)) * wide(scales)
    return replace(Constant.of(table.name, values), narrow=table.stored.nbytes)


def _restoring(scales: _PerRow, zeros: _PerRow | None, table: Constant) -> Quantization | None:
    """Scales and zero points as a quantization has them; None where it has no such ones."""
    factor, axis = scales
    if zeros is None:
        return Quantization(factor.astype(np.float32), None, axis, 0)
    offset, along = zeros
    if factor.size > 1 and offset.size > 1 and axis != along:
        return None
    signed = table.signed if table.packed is not None else table.stored.dtype == np.int8
    levels = offset.astype(np.int8 if signed else np.uint8)
    if (levels != offset).any():
        return None
    size = np.broadcast_shapes(factor.shape, offset.shape)
    return Quantization(
        np.broadcast_to(factor.astype(np.float32), size),
        np.broadcast_to(levels, size),
        axis if factor.size > 1 else along,
        0,
    )


def _check_tokens(cover: Cover, node: Node, where: str) -> None:
    vocab = cover.frame.small.constants[node.inputs[0]].shape[0]
    if not _are_tokens(cover, node.inputs[1], vocab):
        raise UnsupportedOpError("looks up rows by something other than the token ids", where=where)


def _looked_up_by(cover: Cover, node: Node, where: str) -> tuple[str, int]:
    """What ``node`` looks up by, and what stands before the first token; as Embedding has them."""
    trace, earlier = cover.frame.trace(node.inputs[1]), cover.earlier
    if trace.source == cover.segments and _keeps_order(trace):
        return "segment", 0
    if earlier is not None and trace.source == earlier.port.name and _keeps_order(trace):
        return "earlier", earlier.first
    _check_tokens(cover, node, where)
    return "token", 0


def _are_tokens(cover: Cover, value: str, vocab: int) -> bool:
    """Whether ``value`` holds the token ids in order: as they are, or after what changes none of
    them, such as a product with the mask, or a limit to the table."""
    key = ("tokens", value, vocab)
    if key not in cover.cache:
        cover.cache[key] = _in_order(cover, value) or _unchanged(cover, value, vocab)
    return bool(cover.cache[key])


def _in_order(cover: Cover, value: str) -> bool:
    trace = cover.frame.trace(value)
    return trace.source == cover.tokens and _keeps_order(trace)


def _keeps_order(trace: Trace) -> bool:
    return bool((trace.index.reshape(-1) == np.arange(trace.index.size)).all())


def _maker(cover: Cover, value: str) -> Node | None:
    """What computes the elements of ``value``, which is of them in their order."""
    trace = cover.frame.trace(value)
    return cover.frame.producers.get(trace.source) if _keeps_order(trace) else None


def _unchanged(cover: Cover, value: str, vocab: int) -> bool:
    """Whether every id below ``vocab`` is itself in ``value``, at any place."""
    full = cover.frame.full
    nodes = between(cover.frame, cover.tokens, value)
    shape = full.shapes[cover.tokens]
    for node in nodes:
        operator = operator_of(node)
        data = None if operator.kind is Kind.ELEMENTWISE else operator.data
        operands = [name for name in node.inputs[:data] if name in full.constants]
        same_everywhere = all(full.constants[n].stored.size and _one(full, n) for n in operands)
        in_place = operator.kind is Kind.ELEMENTWISE or (
            operator.kind is Kind.MOVE
            and full.shapes[node.outputs[0]] == full.shapes[node.inputs[0]] == shape
            and node.op_type in ("Identity", "Reshape", "Squeeze", "Unsqueeze")
        )
        if not in_place or not same_everywhere:
            return False
    for begin in range(0, vocab, full.length):
        ids = np.minimum(np.arange(begin, begin + full.length), vocab - 1).reshape(shape)
        result = evaluate(full, nodes, {cover.tokens: ids}, value)
        if result.shape != shape or (result != ids).any():
            return False
    return True


def _one(frozen: Frozen, name: str) -> bool:
    return uniform(frozen, name) is not None


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
