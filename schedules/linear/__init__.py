"""Linear layers: which kernel serves which format, how its weights are packed, what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from slmtvm.schedules.isa import PAIRS, Isa
from slmtvm.schedules.isa.base import Buffer
from slmtvm.schedules.kernel import Kernel, Tensor, Tunable
from slmtvm.schedules.linear import (
    blocks,
    by_row,
    channel_blocks,
    columns,
    floating,
    grouped,
    listed_blocks,
    listed_weights,
    pairs,
    row_pairs,
    rows_in_lanes,
    turned_bytes,
    turned_pairs,
    turned_rows,
    weight_only,
    windows,
)
from slmtvm.schedules.linear.integer import unrolled
from slmtvm.schedules.linear.knobs import BY_TILE, Knobs, KnobSpace
from slmtvm.schedules.linear.scheme import Scheme, Weights
from slmtvm.schedules.linear.shape import (
    COLUMNS,
    FREE,
    IN_LISTS,
    LinearShape,
    pick_scale_dtype,
)
from slmtvm.schedules.linear.tile import Frame, Store, Tile, define_tiled
from slmtvm.schedules.linear.unpacking import define_unpacked

__all__ = [
    "LinearShape", "Weights", "build", "default_knobs", "effective_knobs", "knob_space", "layout",
    "pack", "packed_weights", "pick_scale_dtype", "reference", "turns",
]  # fmt: skip

_SCHEMES: dict[str, Scheme] = {"f32": floating, "block": grouped, "row_u8": by_row}
"""By activation; sparse weights are ``blocks``, ``columns``, ``windows``, ``pairs``,
``turned_pairs``, ``row_pairs``, ``rows_in_lanes``, ``listed_blocks`` or ``listed_weights``, those
with scales on float32 activations ``weight_only``, and ``channel_blocks`` where blocks of channels
share them."""

_LISTED = {IN_LISTS: listed_blocks, FREE: listed_weights}


def build(
    shape: LinearShape, isa: Isa, knobs: Knobs | None = None, frame: Frame = define_tiled
) -> Kernel:
    """The kernel of ``shape``; ``knobs`` default to ``default_knobs``.

    Tensors in order: the activations, which are x float32 (m, k), or xq, xs, xsum for "block", or
    xq, xs, xz for "row_u8"; the packed weights; bias (n,) and residual (m, n) where the shape has
    them; y float32 (m, n). Every element of y is computed by the same sequence of float operations
    whatever m, the knobs and the division of the grid. ``frame`` says which tiles there are.
    """
    scheme, settings = _scheme(shape), knobs or default_knobs(shape, isa)
    if shape.sparse and not shape.in_lists:
        isa = isa.for_blocks
    inputs = [*scheme.activations(shape, isa), *scheme.weight_tensors(shape, isa)]
    if shape.in_turned_pairs:
        inputs.append(turned_pairs.scratch(shape, isa, settings))

    def emit(tile: Tile, named: Mapping[str, Buffer], store: Store) -> None:
        scheme.emit(shape, settings, tile, named, store)

    if settings.get("rt", 1) > 1:
        dot = grouped.dot_of(shape, isa, settings)
        kernel = define_unpacked(shape, isa, settings, dot, inputs, emit)
    else:
        kernel = frame(shape, isa, settings, inputs, emit)
    return replace(kernel, tunable=Tunable("linear", replace(shape, padded=False), settings))


def packed_weights(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """The packed weights, in the order of the kernel's tensors."""
    return _scheme(shape).weight_tensors(shape, isa)


def pack(shape: LinearShape, isa: Isa, weights: Weights) -> dict[str, np.ndarray]:
    """``weights`` in the order the kernel reads; independent of m."""
    scheme, packed = _scheme(shape), {}
    arrays = scheme.pack(shape, isa, weights)
    for tensor, array in zip(scheme.weight_tensors(shape, isa), arrays, strict=True):
        fits = tensor.takes(array.shape) if tensor.at_most else array.shape == tensor.shape
        assert fits and array.dtype == tensor.dtype, (tensor, array.shape)
        packed[tensor.name] = array
    return packed


def layout(shape: LinearShape, isa: Isa) -> str:
    """Two targets, and two kernels, for which this is equal share packed weights byte for byte."""
    if shape.in_row_pairs:
        return row_pairs.layout(isa)
    if shape.in_lists:
        listed = _LISTED.get(shape.window)
        return listed.layout(shape, isa) if listed else rows_in_lanes.layout(shape)
    if shape.window == COLUMNS:
        return columns.layout(shape, isa)
    if shape.window:
        return (pairs if shape.group_size else windows).layout(shape, isa)
    if shape.sparse:
        return f"blocks{isa.for_blocks.block_channels}x{isa.k_step}-{shape.format}-row_u8"
    if shape.activation == "f32" and not shape.weight_only:
        return f"panel{isa.panel}-{shape.format}-f32-k1-s32"
    if shape.group_channels:
        return f"panel{isa.panel}-{shape.format}-c{shape.group_channels}-k{isa.k_step}-s32"
    grouped_as = "block" if shape.group_size else shape.activation
    scale = f"s{shape.scale_dtype[5:]}" if shape.group_size else "s32"
    return f"panel{isa.panel}-{shape.format}-{grouped_as}-k{isa.k_step}-{scale}"


def turns(shape: LinearShape, isa: Isa) -> bool:
    """Whether a sparse layer's rows are turned before its kernel takes them; rows in lists are."""
    if shape.in_lists or shape.in_row_pairs:
        return False
    if shape.window == PAIRS.name:
        return pairs.turns(shape, isa)
    if shape.window == COLUMNS:
        return columns.turns(shape.m, isa)
    return not shape.window and blocks.turns(shape.m, isa)


def turning(shape: LinearShape, isa: Isa) -> Kernel:
    """The rows of a layer -> what its kernel takes, xt, where they are turned or in lists."""
    if shape.activation == "f32":
        return rows_in_lanes.turning(shape.m, shape.k, isa)
    if shape.window == COLUMNS:
        return columns.turning(shape, isa)
    return (turned_bytes if shape.window == FREE else turned_rows).turning(shape, isa)


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    """Every knob's settings: ``mr`` rows and ``nv`` vectors of a tile, ``ku`` unrolled k, ``gu``
    groups of k in a round of the loop, ``pf`` how far ahead weights are prefetched (0 not at all,
    1 by a tile, else so many bytes), ``ps`` whether scales are as well, ``rt`` tiles of rows that
    share weights unpacked once (1: each tile unpacks its own); on GPUs ``teams`` of a block of
    threads (0: by the grid)."""
    space = _scheme(shape).knob_space(shape, isa)
    return {**space, "teams": isa.teams} if isa.teams else space


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    """The setting used where nothing was tuned."""
    knobs = _scheme(shape).default_knobs(shape, isa)
    return {**knobs, "teams": 0} if isa.teams else knobs


def effective_knobs(shape: LinearShape, isa: Isa, knobs: Knobs) -> Knobs:
    """``knobs`` as they are really used: of settings that make the same code, one."""
    isa = isa.for_blocks if shape.sparse and not shape.in_lists else isa
    used = {**knobs, "mr": min(knobs["mr"], shape.m)}
    if shape.in_turned_pairs:
        return turned_pairs.default_knobs(shape, isa)
    if shape.turned and not shape.window:
        # Settings may come from a shape whose rows lie in other blocks.
        used["mr"] = blocks.rows_of_tile(shape, isa, used["mr"])
    while used["nv"] > isa.vectors and used["nv"] // 2 * isa.lanes >= shape.n:
        used["nv"] //= 2
    if "gu" in used:
        used["gu"] = min(used["gu"], shape.groups)
    if "rt" in used:
        used["rt"] = min(used["rt"], shape.m // used["mr"])
    if used.get("rt", 1) > 1:  # a whole tile is unpacked at once: no distance within it
        used["pf"], used["ps"] = min(used["pf"], BY_TILE), 0
    if "ps" in used and used["pf"] <= BY_TILE:
        used["ps"] = 0
    if "ku" not in used or shape.sparse:  # lists are unrolled as the knob says
        return used
    if shape.activation == "f32":
        used["ku"] = min(used["ku"], shape.group_size or shape.k)
    else:
        used["ku"] = unrolled(shape.group_size or shape.padded_k, used["ku"])
    return used


def reference(
    shape: LinearShape,
    *activations: np.ndarray,
    weights: Weights,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """What the kernel computes, in float64: activations as the kernel takes them, weights as
    ``pack`` takes them. -> (m, n)"""
    x, w = _scheme(shape).operands(shape, activations, weights)
    y: np.ndarray = x @ w.T
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def _scheme(shape: LinearShape) -> Scheme:
    if shape.in_row_pairs:
        return row_pairs
    if shape.in_lists:
        return _LISTED.get(shape.window, rows_in_lanes)
    if shape.in_turned_pairs:
        return turned_pairs
    if shape.window == COLUMNS:
        return columns
    if shape.window:
        return pairs if shape.group_size else windows
    if shape.sparse:
        return blocks
    if shape.group_channels:
        return channel_blocks
    return weight_only if shape.weight_only else _SCHEMES[shape.activation]
