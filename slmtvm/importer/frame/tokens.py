"""Which token each element of each value of a frozen graph belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slmtvm.importer.freeze.frozen import Frozen, Shape
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import compute, operator_of
from slmtvm.importer.operators.convolution import is_pointwise, padding

# Of elements that depend on no token, and on several.
NO_TOKEN, MIXED = -1, -2
_FAR = np.iinfo(np.int32).max


def token_maps(frozen: Frozen) -> dict[str, Array]:
    """The token of each element of each dynamic value, int32, or NO_TOKEN or MIXED."""
    maps: dict[str, Array] = {}
    produced = {output for node in frozen.graph.nodes for output in node.outputs}
    for given in frozen.shapes.keys() - produced:  # what there is of each token
        maps[given] = np.arange(frozen.length, dtype=np.int32).reshape(1, -1)
    for node in frozen.graph.nodes:
        outputs = [o for o in node.outputs if o in frozen.shapes]
        if outputs:
            for name, value in zip(node.outputs, _propagate(frozen, node, maps), strict=False):
                if name:
                    maps[name] = value
    return maps


def _propagate(frozen: Frozen, node: Node, maps: dict[str, Array]) -> list[Array]:
    kind = operator_of(node).kind
    shapes = [frozen.shapes.get(o, ()) for o in node.outputs]
    given = [maps.get(i) for i in node.inputs]
    if frozen.is_lookup(node):
        indices = given[1]
        assert indices is not None
        if node.op_type == "GatherND":
            indices = _along(indices, (indices.ndim - 1,))[..., 0]
        spread = indices.reshape(indices.shape + (1,) * (len(shapes[0]) - indices.ndim))
        if node.op_type == "Gather" and node.attrs.get("axis", 0) not in (0, -len(shapes[0])):
            return [np.full(shapes[0], MIXED, np.int32)]
        return [np.broadcast_to(spread, shapes[0])]
    if node.op_type == "GatherElements" and given[1] is not None:
        lines = [given[1]]
        if given[0] is not None:
            lines.append(_along(given[0], (node.attrs.get("axis", 0) % given[0].ndim,)))
        return [_combine(lines, shapes[0])]
    if kind is Kind.GENERATE:  # padding that no attention explains
        return [np.full(shape, MIXED, np.int32) for shape in shapes]
    if kind is Kind.MOVE:
        moved: list[Array | None] = []
        for name, tokens in zip(node.inputs, given, strict=True):
            if tokens is not None:
                moved.append(tokens)
            elif not name:
                moved.append(None)
            elif operator_of(node).data is None:
                moved.append(np.full(frozen.constants[name].shape, NO_TOKEN, np.int32))
            else:
                moved.append(frozen.constants[name].values())
        return list(compute(frozen.graph, node, moved))
    if kind in (Kind.ELEMENTWISE, Kind.ROUND):
        return [_combine([g for g in given if g is not None], s) for s in shapes]
    if kind is Kind.QUANTIZE:
        # Scale and zero point belong to no token: the row-wise meaning replaces them.
        assert given[0] is not None
        return [given[0], *(np.full(s, NO_TOKEN, np.int32) for s in shapes[1:])]
    if kind is Kind.CONVOLVE:
        return _convolve(frozen, node, given[0], shapes)
    if kind is Kind.SCATTER:
        return [_scatter(frozen, given[0], shapes[0])]
    if kind is Kind.FUSED:
        return _layer(given[: operator_of(node).data], shapes)
    if kind is Kind.REDUCE:
        return [_reduce(frozen, node, given[0], shapes[0])] * len(shapes)
    return [_contract(node, given, shapes[0])]


def _combine(maps: Sequence[Array], shape: Shape) -> Array:
    result = np.full(shape, NO_TOKEN, np.int32)
    for tokens in maps:
        other = np.broadcast_to(tokens, shape)
        agree = (result == other) | (result == NO_TOKEN)
        result = np.where(other == NO_TOKEN, result, np.where(agree, other, MIXED))
    return result.astype(np.int32)


def _along(tokens: Array, axes: tuple[int, ...]) -> Array:
    """The token of each line along ``axes``, kept as size 1."""
    most = tokens.max(axis=axes, keepdims=True, initial=NO_TOKEN)
    least = np.where(tokens == NO_TOKEN, _FAR, tokens).min(axis=axes, keepdims=True, initial=_FAR)
    same = (least == most) | (most == NO_TOKEN)
    return np.where(same & (least != MIXED), most, MIXED).astype(np.int32)


def _reduce(frozen: Frozen, node: Node, tokens: Array | None, shape: Shape) -> Array:
    operator = operator_of(node)
    assert operator.axes is not None and tokens is not None
    values = [None, *(frozen.constants[i].values() if i else None for i in node.inputs[1:])]
    axes, keep = operator.axes(node.attrs, values, tokens.ndim)
    lines = _along(tokens, axes)
    return np.broadcast_to(lines, shape) if keep is None else lines.reshape(shape)


def _convolve(
    frozen: Frozen, node: Node, tokens: Array | None, shapes: Sequence[Shape]
) -> list[Array]:
    """An element belongs to the newest token that it reads; what it reads is checked later."""
    if tokens is None:
        return [np.full(shape, MIXED, np.int32) for shape in shapes]
    if node.op_type == "CausalConvWithState":
        return [tokens, *(np.full(shape, NO_TOKEN, np.int32) for shape in shapes[1:])]
    lines = _along(tokens, (1,))
    weight = frozen.shape(node.inputs[1])
    if weight is not None and is_pointwise(node.attrs, weight):
        return [np.broadcast_to(lines, shapes[0])]
    padded = np.pad(lines, ((0, 0), (0, 0), padding(node.attrs)), constant_values=NO_TOKEN)
    taps = padded.shape[2] - shapes[0][2]
    return [np.broadcast_to(padded[:, :, taps:], shapes[0])]


def _scatter(frozen: Frozen, tokens: Array | None, shape: Shape) -> Array:
    """Elements scattered into constants lie in rows of tokens; this is checked later."""
    if tokens is not None:
        return tokens
    axes = [i for i, d in enumerate(shape) if d == frozen.length]
    if len(axes) != 1:
        return np.full(shape, MIXED, np.int32)
    line = np.arange(frozen.length, dtype=np.int32)
    return np.broadcast_to(
        line.reshape([-1 if i == axes[0] else 1 for i in range(len(shape))]), shape
    )


def _layer(given: Sequence[Array | None], shapes: Sequence[Shape]) -> list[Array]:
    """Lines of a layer's outputs belong to the tokens of its inputs; its cache belongs to none."""
    lines = [_along(tokens, (tokens.ndim - 1,)) for tokens in given if tokens is not None]
    lead = max((line.shape[:-1] for line in lines), key=len, default=None)
    return [
        _combine(lines, shape) if shape[:-1] == lead else np.full(shape, NO_TOKEN, np.int32)
        for shape in shapes
    ]


def _contract(node: Node, given: Sequence[Array | None], shape: Shape) -> Array:
    """A product's row belongs to the token of the left row; attention checks the rest.

    Where the left side is a constant, columns belong to the tokens of the right ones.
    """
    left, right = given[0], given[1] if len(given) > 1 else None
    if node.op_type == "Gemm":
        left = left.T if left is not None and node.attrs.get("transA", 0) else left
        right = right.T if right is not None and node.attrs.get("transB", 0) else right
    if left is None:
        assert right is not None
        columns = _along(right, (max(right.ndim - 2, 0),))
        return np.broadcast_to(columns, shape) if right.ndim > 1 else columns.reshape(shape)
    if left.ndim < 2:
        return np.full(shape, MIXED, np.int32)
    return np.broadcast_to(_along(left, (left.ndim - 1,)), shape)
