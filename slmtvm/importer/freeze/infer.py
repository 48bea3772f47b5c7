"""Nodes that depend on tokens: the shapes and dtypes of their results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.freeze.frozen import Frozen, Shape
from slmtvm.importer.graph import Array, Constant, Node
from slmtvm.importer.operators import Kind, Operator
from slmtvm.importer.operators.compute import COMPUTE_ERRORS, compute, nothing, operator_of

MIN_ELEMENTS = 1 << 22  # that a value may have, however small the graph is


def infer(frozen: Frozen, node: Node, limit: int) -> None:
    """Record shapes and dtypes of a node that depends on the tokens."""
    operator = operator_of(node)
    if operator.kind is Kind.SCATTER:
        target, (name,) = node.inputs[0], node.outputs
        frozen.shapes[name] = frozen.shape(target) or ()
        frozen.dtypes[name] = frozen.dtype(target)
        return
    shapes = [frozen.shape(i) for i in node.inputs]
    try:
        results = _shapes(frozen, node, operator, shapes)
        reach = _reach(frozen, node, operator)
        if reach is not None and reach < frozen.length:
            raise ValueError(f"tables of {reach} positions for {frozen.length} tokens")
    except UnsupportedOpError as error:
        raise UnsupportedOpError(str(error), where=frozen.graph.where(node)) from error
    except COMPUTE_ERRORS as error:
        listing = [None if s is None else list(s) for s in shapes]
        raise InvalidModelError(
            f"cannot be computed on shapes {listing}: {error}",
            where=frozen.graph.where(node),
        ) from error
    if reach is not None:
        frozen.ends[node.outputs[0]] = reach
    if results is None:
        reason = f"{node.label}: its result depends on token values in a way that is not supported"
        frozen.broken.update(dict.fromkeys(filter(None, node.outputs), reason))
        return
    largest = max(limit, MIN_ELEMENTS * frozen.length)
    # Rows of a table of matrices are never computed all at once.
    if any(math.prod(s) > largest for s in results) and not frozen.is_lookup(node):
        raise InvalidModelError(
            f"has an impossible shape {[list(s) for s in results]}", where=frozen.graph.where(node)
        )
    many = _result_dtypes(frozen, node, operator)
    for index, name in enumerate(node.outputs):
        if not name:
            continue
        if index >= len(results) or index >= len(many):
            raise UnsupportedOpError(
                f"output {name!r} is not supported", where=frozen.graph.where(node)
            )
        shape, dtype = results[index], np.dtype(many[index])
        if 0 in shape and frozen.length in shape:
            # Each token has no features here, as where a rotary embedding leaves none unrotated.
            frozen.constants[name] = Constant.of(name, np.empty(shape, dtype))
        else:
            frozen.shapes[name], frozen.dtypes[name] = shape, dtype


def _reach(frozen: Frozen, node: Node, operator: Operator) -> int | None:
    constants = [frozen.constants.get(i) for i in node.inputs]
    return None if operator.reach is None else operator.reach(node.attrs, constants)


def _result_dtypes(frozen: Frozen, node: Node, operator: Operator) -> tuple[Any, ...]:
    dtypes = [None if not i else frozen.dtype(i) for i in node.inputs]
    try:
        result = dtypes[0] if operator.result is None else operator.result(dtypes, node.attrs)
    except COMPUTE_ERRORS as error:
        raise InvalidModelError(
            f"input types {dtypes} do not fit: {error}", where=frozen.graph.where(node)
        ) from error
    return result if isinstance(result, tuple) else (result,) * len(node.outputs)


def _shapes(
    frozen: Frozen, node: Node, operator: Operator, shapes: Sequence[Shape | None]
) -> list[Shape] | None:
    """Output shapes; None where they depend on token values. Raises where inputs do not fit."""
    constants = [frozen.constants.get(i) if i else None for i in node.inputs]
    if frozen.is_lookup(node) and node.op_type == "Gather":
        table, indices = shapes[0], shapes[1]
        assert table is not None and indices is not None
        axis = node.attrs.get("axis", 0)
        axis = axis + len(table) if axis < 0 else axis
        table[axis]  # raises where there is no such axis
        return [table[:axis] + indices + table[axis + 1 :]]
    if frozen.is_lookup(node) and node.op_type == "GatherND":
        table, indices = shapes[0], shapes[1]
        assert table is not None and indices is not None
        if node.attrs.get("batch_dims", 0) or not 0 < indices[-1] <= len(table):
            raise ValueError("rows are looked up by indices that do not fit the table")
        return [indices[:-1] + table[indices[-1] :]]
    if node.op_type == "GatherElements" and constants[1] is None:
        assert shapes[1] is not None
        return [shapes[1]]
    if operator.shapes is not None:
        return operator.shapes(node.attrs, shapes, constants)
    if operator.kind is Kind.ELEMENTWISE:
        given = [s for s in shapes if s is not None]
        return [np.broadcast_shapes(*given)] * max(len(node.outputs), 1)
    if operator.kind is Kind.REDUCE:
        if any(c is None for i, c in zip(node.inputs[1:], constants[1:], strict=True) if i):
            return None
        return [_reduced(node, operator, shapes[0], constants)]
    if operator.kind is not Kind.MOVE:
        return None
    count = len(node.inputs) if operator.data is None else operator.data
    if any(i and c is None for i, c in zip(node.inputs[count:], constants[count:], strict=True)):
        return None
    moved: list[Array | None] = [None if s is None else nothing(s) for s in shapes]
    moved[count:] = [None if c is None else c.values() for c in constants[count:]]
    return [r.shape for r in compute(frozen.graph, node, moved)]


def _reduced(
    node: Node, operator: Operator, shape: Shape | None, constants: Sequence[Constant | None]
) -> Shape:
    assert operator.axes is not None and shape is not None
    values = [None, *(None if c is None else c.values() for c in constants[1:])]
    axes, keep = operator.axes(node.attrs, values, len(shape))
    if keep is None:
        return shape
    kept = [1 if i in axes else d for i, d in enumerate(shape) if keep or i not in axes]
    return tuple(kept)
