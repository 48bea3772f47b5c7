"""Which linear layers skip the zeros of their weights: those that are expected to gain by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from slmtvm.ir import ops
from slmtvm.ir.lowered import SparseLayer
from slmtvm.passes.lower_kernels.embedding import layer_of_table
from slmtvm.passes.lower_kernels.emitter import KernelEmitter
from slmtvm.passes.lower_kernels.linear import linear_shape, without_rows
from slmtvm.passes.lower_kernels.registry import shape_of
from slmtvm.schedules.isa import PAIRS, WINDOWS, Isa
from slmtvm.schedules.linear import (
    LinearShape,
    Weights,
    blocks,
    columns,
    listed_blocks,
    listed_weights,
    pairs,
    row_pairs,
    rows_in_lanes,
    windows,
)
from slmtvm.schedules.linear.shape import COLUMNS, FREE, IN_LISTS, PAIR_UNIT

KERNELS = ("blocks", COLUMNS, *WINDOWS, PAIRS.name, IN_LISTS, FREE)
SPARSE = ("auto", "off", *KERNELS)
"""A kernel's name: every layer that it fits takes it, expected to gain or not, and no other one."""

NOTABLE = 0.95
"""Blocks in use, up to which a layer is said to have zeros in blocks: some have one by accident."""

NOTABLE_FREE = 0.75
"""The same of single weights."""

LIMIT = 0.9
"""Of the dense kernel's expected time: what is nearer to it may as well be slower."""


MOST_BESIDE = 0.5
"""Bytes that lists of int8 blocks may take, of those of all weights, where these stay for steps of
few rows."""

_SERVED = (("int8", "row_u8"), ("int4", "block"), ("f32", "f32"))


def choose_sparse(
    emitter: KernelEmitter, embeddings: Sequence[relax.Call], sparse: str = "auto"
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
        if (str(call.attrs["format"]), str(call.attrs["activation"])) in _SERVED:
            m = shape_of(call.args[0])[0]
            rows.setdefault(emitter.operand_names(named), []).append((call.attrs, m, named))
    found = []
    for key, uses in rows.items():
        attrs, _, named = uses[0]
        weights = emitter.weights_of(named)
        shape = without_rows(linear_shape(attrs, 1, named, emitter))
        kinds = _kinds(shape, weights, emitter.isa, [m for _, m, _ in uses])
        if sparse in KERNELS:
            kinds = [kind for kind in kinds if kind.name == sparse]
        if not kinds:
            continue
        # What serves one row too comes before what leaves that to the dense kernel.
        best = min(kinds, key=lambda kind: (kind.time > LIMIT, not kind.serves_all, kind.mean))
        taken = (best.time <= LIMIT or sparse in KERNELS) and key not in tables
        if taken:
            emitter.sparse[key] = best.shape
        name = named["weight"].name
        found.append(SparseLayer(name, best.name, best.density, best.time, best.left, taken))
    return tuple(found)


@dataclass(frozen=True)
class _Kind:
    """A sparse kernel of a layer; density and left as SparseLayer has them."""

    shape: LinearShape
    density: float
    times: Mapping[int, float]
    """By number of rows."""
    left: float
    serves_all: bool = True
    """Whether it runs every number of rows: the dense kernel, with weights of its own, runs others.
    """

    @property
    def time(self) -> float:
        """For the number of rows that gains least."""
        return max(self.times.values())

    @property
    def mean(self) -> float:
        """Of steps of all numbers of rows, one of each."""
        return sum(m * time for m, time in self.times.items()) / sum(self.times)

    @property
    def name(self) -> str:
        return self.shape.window or (IN_LISTS if self.shape.in_lists else "blocks")


def _kinds(shape: LinearShape, weights: Weights, isa: Isa, rows: Sequence[int]) -> list[_Kind]:
    """What can run the layer for the numbers of ``rows``."""
    if shape.group_size:
        return _kinds_in_groups(shape, weights, isa, rows)
    if shape.format == "f32":
        return _kinds_of_floats(shape, weights, isa, rows)
    found = []
    density = blocks.density(shape, isa, weights)
    if density <= NOTABLE:
        # Zero points cost a sum more for each list: they are taken off where they can be.
        needed = shape.has_zero_points and blocks.centred(weights) is None
        times = {
            m: blocks.relative_time(dataclasses.replace(shape, m=m), isa, density) for m in rows
        }
        sparse = dataclasses.replace(shape, sparse=True, has_zero_points=needed)
        found.append(_Kind(sparse, density, times, density * blocks.bytes_of_block(isa)))
    found += _kinds_in_columns(shape, weights, isa, rows)
    for name in isa.window_times:
        window = WINDOWS[name]
        if windows.fits(window, weights):
            times = {m: windows.relative_time(name, isa, m) for m in rows}
            sparse = dataclasses.replace(shape, sparse=True, window=name, has_zero_points=False)
            left = windows.bytes_left(window)
            found.append(_Kind(sparse, window.kept / window.size, times, left))
    if isa.row_pair_times is not None and row_pairs.fits(shape, weights):
        times = {m: isa.row_pair_times[m > 1] for m in rows}
        sparse = dataclasses.replace(shape, sparse=True, window=PAIRS.name, has_zero_points=False)
        found.append(_Kind(sparse, PAIRS.kept / PAIRS.size, times, row_pairs.BYTES_LEFT))
    return found + _kinds_in_lists(shape, weights, isa, rows)


def _kinds_in_columns(
    shape: LinearShape, weights: Weights, isa: Isa, rows: Sequence[int]
) -> list[_Kind]:
    if isa.column_costs is None or not columns.fits(shape, weights):
        return []
    density = columns.density(shape, weights)
    if density > NOTABLE:
        return []
    times = {m: columns.relative_time(dataclasses.replace(shape, m=m), isa, density) for m in rows}
    sparse = dataclasses.replace(shape, sparse=True, window=COLUMNS, has_zero_points=False)
    return [_Kind(sparse, density, times, columns.bytes_left(density))]


def _kinds_in_groups(
    shape: LinearShape, weights: Weights, isa: Isa, rows: Sequence[int]
) -> list[_Kind]:
    if isa.pair_times is None or shape.group_size % PAIR_UNIT or not pairs.fits(shape, weights):
        return []
    times = {m: pairs.relative_time(dataclasses.replace(shape, m=m), isa) for m in rows}
    sparse = dataclasses.replace(shape, sparse=True, window=PAIRS.name, has_zero_points=False)
    sparse = dataclasses.replace(sparse, float_zero_points=False)
    return [_Kind(sparse, PAIRS.kept / PAIRS.size, times, pairs.BYTES_LEFT)]


def _kinds_in_lists(
    shape: LinearShape, weights: Weights, isa: Isa, rows: Sequence[int]
) -> list[_Kind]:
    many = [m for m in rows if m >= rows_in_lanes.MIN_ROWS]
    if not many or (shape.has_zero_points and blocks.centred(weights) is None):
        return []
    all_, found = len(many) == len(rows), []
    for window, listed, cost in (
        (IN_LISTS, listed_blocks, isa.listed_blocks),
        (FREE, listed_weights, isa.listed_weights),
    ):
        density = listed.density(shape, weights) if cost is not None else None
        if density is None or density > NOTABLE:
            continue
        left = listed.bytes_left(density)
        if all_ or left <= MOST_BESIDE:
            times = {
                m: listed.relative_time(dataclasses.replace(shape, m=m), isa, density) for m in many
            }
            sparse = dataclasses.replace(shape, sparse=True, window=window, has_zero_points=False)
            found.append(_Kind(sparse, density, times, left + (not all_), all_))
    return found


def _kinds_of_floats(
    shape: LinearShape, weights: Weights, isa: Isa, rows: Sequence[int]
) -> list[_Kind]:
    """Lists serve many rows; with fewer, the layer stays dense, and has its weights twice."""
    many = [m for m in rows if m >= rows_in_lanes.MIN_ROWS]
    if isa.listed_rows is None or not many or shape.k > rows_in_lanes.MAX_K:
        return []
    density = float(np.count_nonzero(weights.weight)) / weights.weight.size
    if density > NOTABLE_FREE:
        return []
    times = {
        m: rows_in_lanes.relative_time(dataclasses.replace(shape, m=m), isa, density) for m in many
    }
    all_, left = len(many) == len(rows), rows_in_lanes.bytes_left(density)
    sparse = dataclasses.replace(shape, sparse=True)
    return [_Kind(sparse, density, times, left + (not all_), all_)]
