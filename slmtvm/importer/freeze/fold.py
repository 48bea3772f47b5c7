"""Nodes whose inputs are all constants: their results, packed weights still packed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.freeze.restored import cast_levels, computed, narrow_bytes
from slmtvm.importer.graph import (
    Array,
    Constant,
    Graph,
    Node,
    Quantization,
    reshaped,
    transposed,
)
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import (
    COMPUTE_ERRORS,
    compute,
    compute_quietly,
    nothing,
    operator_of,
)
from slmtvm.importer.operators.elementwise import cast_dtype
from slmtvm.importer.rewrite.halves import narrowed, widened

_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")


def fold(frozen: Frozen, node: Node, limit: int) -> None:
    """Record the results of a node of constants, each of at most ``limit`` elements."""
    given = [frozen.constants[i] if i else None for i in node.inputs]
    try:
        # What follows from the sequence, such as a bias by distance, is no weight.
        no_weight = _restores(node, given) and node.inputs[0] in frozen.of_sequence
        lazy = None if no_weight else _keep_packed(node, given)
        if lazy is not None:
            frozen.constants[node.outputs[0]] = lazy
            return
        values = [None if c is None else c.values() for c in given]
    except UnsupportedOpError as error:
        raise UnsupportedOpError(str(error), where=frozen.graph.where(node)) from error
    except COMPUTE_ERRORS as error:
        raise InvalidModelError(
            f"cannot be computed: {error}", where=frozen.graph.where(node)
        ) from error
    _check_size(frozen.graph, node, values, limit)
    if operator_of(node).kind is Kind.MOVE:
        results = compute(frozen.graph, node, values)
    else:
        wide = compute(frozen.graph, node, widened(values))
        results = tuple(narrowed(result, values) for result in wide)
    source = given[0] if given else None
    if source is not None and node.inputs[0] not in frozen.of_sequence:
        _note_end(frozen, node, source, values, results[0])
    for name, value in zip(node.outputs, results, strict=False):
        if not name:
            continue
        # A view of a weight is still that weight, and keeps its name.
        view = source is not None and np.may_share_memory(value, source.stored)
        title = source.name if view and source is not None else name
        narrow = narrow_bytes(given, value)
        frozen.constants[name] = replace(Constant.of(title, value), narrow=narrow)


def _note_end(
    frozen: Frozen, node: Node, table: Constant, values: Sequence[Array | None], result: Array
) -> None:
    """Remember at which length ``node`` would read the last row of its table, if that is one of
    positions: each length says so, and whether a longer one fails is tried."""
    length = frozen.length
    if node.op_type == "Gather" and length in result.shape:
        indices = values[1]
        if indices is not None and indices.size >= length:
            rows = table.shape[node.attrs.get("axis", 0)]
            frozen.ends[node.outputs[0]] = rows - (int(indices.max()) - (length - 1))
    elif node.op_type == "Slice" and len(result.shape) == len(table.shape):
        cut = [t for t, r in zip(table.shape, result.shape, strict=True) if r == length != t]
        if cut:
            frozen.ends[node.outputs[0]] = min(cut)


def _restores(node: Node, given: Sequence[Constant | None]) -> bool:
    """Whether ``node`` makes floats of integers."""
    integers = bool(given) and given[0] is not None and given[0].dtype.kind in "iub"
    return node.op_type == "DequantizeLinear" or (node.op_type == "Cast" and integers)


def _keep_packed(node: Node, given: Sequence[Constant | None]) -> Constant | None:
    """The result of ``node`` without expanding a packed weight, or None where it must compute."""
    if not given or given[0] is None:
        return None
    first = given[0]
    if node.op_type == "DequantizeLinear" and first.quantization is None:
        scales, zeros = given[1], given[2] if len(given) > 2 else None
        if scales is None:
            return None
        quantization = Quantization(
            scales.values(table=True),
            None if zeros is None else zeros.values(table=True),
            node.attrs.get("axis", 1),
            node.attrs.get("block_size", 0),
        )
        quantization.check(first.shape)
        return replace(first, dtype=scales.dtype, quantization=quantization)
    if node.op_type == "Cast":
        dtype = cast_dtype(node.attrs)
        floats = first.dtype.kind not in "iub" and dtype.kind not in "iub"
        if floats and dtype.itemsize >= first.dtype.itemsize:
            return replace(first, dtype=dtype)
        return cast_levels(first, dtype)
    if node.op_type in ("Mul", "Sub"):
        return computed(node.op_type, given)
    if first.plain:
        return None
    if node.op_type == "Identity":
        return first
    if operator_of(node).kind is Kind.MOVE and first.quantization is None and first.packed is None:
        rest = [None if c is None else c.values() for c in given[1:]]
        moved = compute_quietly(node, [first.stored, *rest])
        return None if moved is None else replace(first, stored=moved)
    if node.op_type == "Transpose" and len(first.shape) == 2:
        return first if node.attrs.get("perm", (1, 0)) != (1, 0) else transposed(first)
    if node.op_type in _RESHAPES:
        rest = [None if c is None else c.values() for c in given[1:]]
        moved = compute_quietly(node, [nothing(first.shape), *rest])
        return None if moved is None else reshaped(first, moved.shape)
    return None


def _check_size(graph: Graph, node: Node, values: Sequence[Array | None], limit: int) -> None:
    operator = operator_of(node)
    arrays = [v for v in values if v is not None]
    try:
        if operator.size is not None:
            size = operator.size(node.attrs, values)
        elif operator.kind is Kind.ELEMENTWISE and operator.shapes is None:
            size = math.prod(np.broadcast_shapes(*(a.shape for a in arrays)))
        else:
            size = sum(a.size for a in arrays)
    except COMPUTE_ERRORS as error:
        shapes = [list(a.shape) for a in arrays]
        raise InvalidModelError(
            f"cannot be computed on shapes {shapes}: {error}", where=graph.where(node)
        ) from error
    if size > limit:
        raise InvalidModelError(
            f"computing this constant takes {size} elements; at most {limit} are allowed at this "
            "context length",
            where=graph.where(node),
        )
