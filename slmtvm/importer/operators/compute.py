"""Nodes on numpy arrays, and what ends it where these do not fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.graph import Array, Graph, Node
from slmtvm.importer.operators import Operator, find

# What numpy raises where operands do not fit each other.
COMPUTE_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def operator_of(node: Node) -> Operator:
    """The table's entry for ``node``; load has checked that there is one."""
    operator = find(node.domain, node.op_type, node.version)
    assert operator is not None
    return operator


def compute(graph: Graph, node: Node, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    """``node`` on ``inputs``; raises InvalidModelError naming it where they do not fit."""
    attrs = node.attrs
    if node.op_type == "Split":
        attrs = {**attrs, "num_outputs": len(node.outputs)}
    try:
        with np.errstate(all="ignore"):
            result = operator_of(node).evaluate(attrs, *inputs)
    except UnsupportedOpError as error:
        raise UnsupportedOpError(str(error), where=graph.where(node)) from error
    except COMPUTE_ERRORS as error:
        shapes = [None if i is None else list(i.shape) for i in inputs]
        raise InvalidModelError(
            f"cannot be computed on shapes {shapes}: {error}", where=graph.where(node)
        ) from error
    results = result if isinstance(result, tuple) else (result,)
    needed = max(i + 1 for i, name in enumerate(node.outputs) if name)
    if needed > len(results):
        raise UnsupportedOpError(
            f"output {node.outputs[needed - 1]!r} is not supported", where=graph.where(node)
        )
    return tuple(np.asarray(r) for r in results)


def compute_quietly(node: Node, inputs: Sequence[Array | None]) -> Array | None:
    """The first output of a one-output node, or None where the inputs do not fit."""
    if len(node.outputs) != 1:
        return None
    try:
        return np.asarray(operator_of(node).evaluate(node.attrs, *inputs))
    except COMPUTE_ERRORS:
        return None


def nothing(shape: tuple[int, ...]) -> Array:
    """An array of a shape that occupies one byte."""
    return np.broadcast_to(np.uint8(0), shape)
