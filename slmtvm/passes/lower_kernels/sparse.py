"""Which linear layers skip the zeros of their weights: those that are expected to gain by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import tvm
from tvm import relax

from slmtvm.ir import ops
from slmtvm.ir.lowered import SparseLayer
from slmtvm.passes.lower_kernels.embedding import layer_of_table
from slmtvm.passes.lower_kernels.emitter import KernelEmitter
from slmtvm.passes.lower_kernels.linear import linear_shape, without_rows
from slmtvm.passes.lower_kernels.registry import shape_of
from slmtvm.schedules.linear import LinearShape, Weights, blocks

SPARSE = ("auto", "off")

NOTABLE = 0.95
"""Blocks in use, up to which a layer is said to have zeros in blocks: some have one by accident."""

LIMIT = 0.9
"""Of the dense kernel's expected time: what is nearer to it may as well be slower."""


def choose_sparse(
    emitter: KernelEmitter, embeddings: Sequence[relax.Call]
) -> tuple[SparseLayer, ...]:
    """Note in ``emitter.sparse`` the layers that gain; those with zeros in blocks at all.

    A layer gains in all functions or in none, whatever their numbers of rows, so that its weights
    are stored once. One whose packed weight is a token table too stays as the table needs it.
    """
    tables = {
        emitter.operand_names(shared)
        for call in embeddings
        if (shared := layer_of_table(call, emitter)) is not None
    }
    rows: dict[Hashable, list[tuple[tvm.ir.Attrs, int, dict[str, relax.Expr]]]] = {}
    for call in emitter.linears:
        named = ops.operands(call)
        if (str(call.attrs["format"]), str(call.attrs["activation"])) == ("int8", "row_u8"):
            m = shape_of(call.args[0])[0]
            rows.setdefault(emitter.operand_names(named), []).append((call.attrs, m, named))
    found = []
    for key, uses in rows.items():
        attrs, _, named = uses[0]
        weights = emitter.weights_of(named)
        shape = without_rows(linear_shape(attrs, 1, named, emitter))
        density = blocks.density(shape, emitter.isa, weights)
        if density > NOTABLE:
            continue
        times = [
            blocks.relative_time(dataclasses.replace(shape, m=m), emitter.isa, density)
            for _, m, _ in uses
        ]
        taken = max(times) <= LIMIT and key not in tables
        if taken:
            emitter.sparse[key] = _sparse_shape(shape, weights)
        left = density * blocks.bytes_of_block(emitter.isa)
        found.append(SparseLayer(named["weight"].name, density, max(times), left, taken))
    return tuple(found)


def _sparse_shape(shape: LinearShape, weights: Weights) -> LinearShape:
    """Zero points cost a sum more for each list: they are taken off the weights where they can."""
    needed = shape.has_zero_points and blocks.centred(weights) is None
    return dataclasses.replace(shape, sparse=True, has_zero_points=needed)
