"""Linear layers with weights of 2, 4 or 8 bits and int8 activations, both scaled by group of k.

``y = sum over groups g of fma(float(sum_k q a) - z[g] xsum[g], s[g] xs[g], y)``, then ``+ bias +
residual``; the bracket is an integer, and exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import Dot, Isa
from slmtvm.schedules.isa.base import Buffer, Expr, Vectors, let, load, prefetch, splat
from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.linear.integer import Operands, Sums, integer_sums
from slmtvm.schedules.linear.knobs import (
    BY_TILE,
    Knobs,
    KnobSpace,
    ahead,
    prefetches,
    tile_knobs,
    tile_space,
)
from slmtvm.schedules.linear.packing import pack_quantized, pad, panels_of_rows, values
from slmtvm.schedules.linear.scheme import Weights
from slmtvm.schedules.linear.shape import LinearShape
from slmtvm.schedules.linear.tile import Registers, Store, Tile
from slmtvm.schedules.linear.unpacking import Unpacked

_UNPACKED_ROWS = 16
"""From more rows than this on, weights are unpacked once for several tiles."""


def activations(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """xq int8 (m, padded_k), xs and xsum float32 (m, groups)."""
    by_group = (shape.m, shape.groups)
    return [
        Tensor("xq", (shape.m, shape.padded_k), "int8"),
        Tensor("xs", by_group, "float32"),
        Tensor("xsum", by_group, "float32"),
    ]


def weight_tensors(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """weight (panels, stored_k, isa.panel); scales and zero_points:
    (panels, groups, isa.panel), the latter bytes or float32."""
    dtype = shape.stored_dtype
    panels = isa.panels(shape.n)
    by_group = (panels, shape.groups, isa.panel)
    tensors = [
        Tensor("weight", (panels, shape.stored_k, isa.panel), dtype),
        Tensor("scales", by_group, shape.scale_dtype),
    ]
    zero_dtype = "float32" if shape.float_zero_points else dtype
    return tensors + [Tensor("zero_points", by_group, zero_dtype)] * shape.has_zero_points


def pack(shape: LinearShape, isa: Isa, weights: Weights) -> list[np.ndarray]:
    """The weight as ``slm.linear`` has it, float8 ones as their type or as bytes.

    scales float (n, groups); zero_points of the same shape, int8 for int8, else uint8, or floats.
    Padding counts as zero: it holds the zero point, and where that is a float, activations
    are padded with zeros.
    """
    weight, scales, zero_points = weights.weight, weights.scales, weights.zero_points
    assert scales is not None
    rows = isa.panels(shape.n) * isa.panel
    packed_scales = pad(scales.reshape(shape.n, shape.groups), rows, shape.groups)
    byte = np.dtype(shape.stored_dtype)
    zero_dtype = np.dtype(np.float32) if shape.float_zero_points else byte
    zeros = np.full(packed_scales.shape, shape.default_zero, zero_dtype)
    if zero_points is not None:
        zeros[: shape.n] = zero_points.reshape(shape.n, shape.groups)
    padding = np.zeros_like(zeros, byte) if shape.float_zero_points else zeros
    arrays = [
        pack_quantized(
            shape, isa, weight, np.repeat(padding, shape.padded_k // shape.groups, axis=1)
        ),
        panels_of_rows(packed_scales.astype(shape.scale_dtype), isa.panel),
    ]
    return arrays + [panels_of_rows(zeros, isa.panel)] * shape.has_zero_points


def emit(
    shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    dot = dot_of(shape, tile.isa, knobs)

    def add(group: Expr, sums: Registers) -> None:
        _add_group(shape, tile, dot, knobs, named, group, sums)

    sum_groups(shape, knobs, tile, store, add)


def sum_groups(
    shape: LinearShape,
    knobs: Knobs,
    tile: Tile,
    store: Store,
    add: Callable[[Expr, Registers], None],
) -> None:
    """The tile's sums: those that ``add`` adds of each group, ``knobs["gu"]`` in a round of the
    loop, and what is added to them."""
    sums = Registers("float32", tile.isa.lanes, tile.rows * tile.vectors)
    together = min(knobs["gu"], shape.groups)
    whole = shape.groups // together * together
    with T.serial(shape.groups // together) as part:
        for i in range(together):
            add(part * together + i, sums)
    for group in range(whole, shape.groups):
        add(group, sums)
    for row, v in tile.cells():
        store.add_and_write(tile, row, v, sums[row * tile.vectors + v])


def _add_group(
    shape: LinearShape,
    tile: Tile,
    dot: Dot,
    knobs: Knobs,
    named: Mapping[str, Buffer],
    group: Expr,
    sums: Registers,
) -> None:
    isa = tile.isa
    size = shape.group_size
    starts = _starts(shape, tile, dot, named, group)
    products = _products(shape, knobs, tile, dot, named, group, starts)
    integers = integer_sums(tile, products, size, knobs["ku"])

    def place(v: int) -> Expr:
        return (tile.panel(v) * shape.groups + group) * isa.panel + tile.lane(v)

    if knobs.get("ps") and knobs["pf"] > BY_TILE:
        # As far ahead as the weights are, in groups.
        further = max(1, knobs["pf"] // _panel_bytes(shape, isa)) * isa.panel
        for v in range(0, tile.vectors, isa.vectors):
            prefetch(named["scales"], place(v) + further)
    corrections = [
        None if starts else _minus_zero_point(shape, isa, dot, named, place(v))
        for v in range(tile.vectors)
    ]
    add_scaled(shape, tile, named, group, integers, corrections, sums)


def add_scaled(
    shape: LinearShape,
    tile: Tile,
    named: Mapping[str, Buffer],
    group: Expr,
    integers: Sums,
    corrections: Sequence[Expr | None],
    sums: Registers,
) -> None:
    """``sums`` plus a group's integer sums, which take ``corrections`` times the row's sum, times
    both scales."""
    isa = tile.isa

    def place(v: int) -> Expr:
        return (tile.panel(v) * shape.groups + group) * isa.panel + tile.lane(v)

    scales = _scales(shape, tile, named["scales"], place)
    for row in range(tile.rows):
        at = tile.row(row) * shape.groups + group
        row_scale = let(T.Broadcast(named["xs"][at], isa.lanes))
        for v in range(tile.vectors):
            exact = let(T.Cast(f"float32x{isa.lanes}", integers[row, v]))
            if corrections[v] is not None:
                row_sum = T.Broadcast(named["xsum"][at], isa.lanes)
                exact = let(T.fma(corrections[v], row_sum, exact))
            index = row * tile.vectors + v
            sums[index] = T.fma(exact, let(scales[v] * row_scale), sums[index])


def _products(
    shape: LinearShape,
    knobs: Knobs,
    tile: Tile,
    dot: Dot,
    named: Mapping[str, Buffer],
    group: Expr,
    starts: dict[int, Vectors],
) -> Operands:
    """Weights and activations of a group."""
    isa, size = tile.isa, shape.group_size

    def row_at(row: int) -> Expr:
        return tile.row(row) * shape.padded_k + group * size

    if "scratch" in named:
        width = tile.vectors * isa.lanes
        return Operands(
            Unpacked(dot),
            8,
            named["scratch"],
            width,
            lambda v: group * (size * width) + v * isa.raw_bytes,
            named["xq"],
            row_at,
            start=starts,
        )
    panel_bytes = _panel_bytes(shape, isa)
    return Operands(
        dot,
        shape.bits,
        named["weight"],
        isa.panel,
        lambda v: (tile.panel(v) * shape.groups + group) * panel_bytes + tile.lane(v) * isa.k_step,
        named["xq"],
        row_at,
        ahead=ahead(knobs, knobs["nv"] * shape.groups * panel_bytes // isa.vectors, 1),
        start=starts,
    )


def _panel_bytes(shape: LinearShape, isa: Isa) -> int:
    """Bytes of a group's weights in a panel."""
    return shape.group_size * isa.panel * shape.bits // 8


def _starts(
    shape: LinearShape, tile: Tile, dot: Dot, named: Mapping[str, Buffer], group: Expr
) -> dict[int, Vectors]:
    """States to start from for the sums to be those of ``q - zero``; none where a row's sums are
    corrected afterwards."""
    zero = shape.default_zero + dot.offset
    if shape.has_zero_points or not zero:
        return {}
    starts = {}
    for row in range(tile.rows):
        row_sum = T.Cast("int32", named["xsum"][tile.row(row) * shape.groups + group])
        state = dot.start(let(T.Broadcast(row_sum * -zero, tile.isa.lanes)))
        if state is not None:
            starts[row] = state
    return starts


def _scales(
    shape: LinearShape, tile: Tile, scales: Buffer, place: Callable[[int], Expr]
) -> list[Expr]:
    """Scales of a group, a float32 vector for each vector of channels."""
    isa = tile.isa
    if shape.scale_dtype == "float32":
        return [let(load(scales, place(v), isa.lanes)) for v in range(tile.vectors)]
    return [
        vector
        for v in range(0, tile.vectors, isa.vectors)  # those of a panel lie together
        for vector in isa.load_halves(scales, place(v), min(isa.vectors, tile.vectors - v))
    ]


def _minus_zero_point(
    shape: LinearShape, isa: Isa, dot: Dot, named: Mapping[str, Buffer], at: Expr
) -> Expr | None:
    """What a channel's sum takes for each unit of the activations' sum; None where nothing."""
    if shape.float_zero_points:
        zero = load(named["zero_points"], at, isa.lanes)
        return let(splat(float(-dot.offset), "float32", isa.lanes) - zero)
    if shape.has_zero_points:
        wide = T.Cast(f"int32x{isa.lanes}", load(named["zero_points"], at, isa.lanes))
        exact = T.Cast(f"float32x{isa.lanes}", let(splat(-dot.offset, "int32", isa.lanes) - wide))
        return let(exact)
    default = shape.default_zero + dot.offset
    return splat(float(-default), "float32", isa.lanes) if default else None


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    scales = (0, 1) if shape.m == 1 else (0,)
    space = {**tile_space(shape, isa), "ku": (16, 32, 64, 128), "gu": (1, 2, 4), "ps": scales}
    return {**space, "rt": (1, 4, 8, 16, 32)} if _can_unpack(shape, isa) else space


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    state = len(_dot(shape, isa, shape.m).state)
    registers = state + 1  # a cell's integer sums, and its float sum
    # Rows whose activations take registers compete with the sums for them.
    tile = tile_knobs(shape, isa, registers, max_rows=4 if isa.row_in_registers else 8)
    # Two groups share the loads of what a row has for each, where registers are left for it.
    one_row = shape.m == 1 and isa.row_in_registers and state == 1
    rows = shape.m > 1 and isa.pairs_groups and shape.bits < 8
    gu = 2 if one_row or rows else isa.row_groups if shape.m == 1 else 1
    knobs = {**tile, "ku": 32, "gu": gu, "ps": 0, "pf": int(prefetches(shape, isa))}
    if _can_unpack(shape, isa):
        knobs |= {"nv": 2, "pf": int(isa.prefetch), **_shared_rows(shape, isa, tile["mr"])}
    return knobs


def _shared_rows(shape: LinearShape, isa: Isa, rows: int) -> Knobs:
    """``mr`` and ``rt`` of tiles of two vectors.

    Few rows: unpacking once costs more, on its way through memory, than it saves. The float sums of
    two vectors do not fit the registers beside the integer ones, but their way through memory, once
    a group, costs less than what the vectors share saves. Many rows: weights are unpacked once
    for all of them where that leaves blocks enough for threads, and all sums of three rows fit.
    """
    if shape.m <= _UNPACKED_ROWS:
        return {"mr": rows, "rt": 1}
    blocks = shape.n // (2 * isa.lanes)
    tiles = 32 if blocks >= 4 * isa.least_blocks else 8
    return {"mr": 3, "rt": min(tiles, shape.m // 3)}


def _can_unpack(shape: LinearShape, isa: Isa) -> bool:
    """Whether weights can be unpacked once for several tiles, see ``unpacking``."""
    return shape.m > 4 and shape.bits < 8 and _dot(shape, isa, shape.m).unpacked is not None


def dot_of(shape: LinearShape, isa: Isa, knobs: Knobs) -> Dot:
    """The products of a kernel's tiles."""
    return _dot(shape, isa, min(knobs["mr"], shape.m))


def _dot(shape: LinearShape, isa: Isa, rows: int) -> Dot:
    return isa.s8_s8() if shape.bits == 8 else isa.fields_s8(shape.bits, rows)


def operands(
    shape: LinearShape, activations: Sequence[np.ndarray], weights: Weights
) -> tuple[np.ndarray, np.ndarray]:
    xq, xs, _ = (a.astype(np.float64) for a in activations)
    x = xq * np.repeat(xs, shape.group_size, axis=1)
    return x[:, : shape.k], dequantized(shape, weights)


def dequantized(shape: LinearShape, weights: Weights) -> np.ndarray:
    """W (n, k) in float64; scales as they are stored."""
    by_group = (shape.n, shape.groups)
    assert weights.scales is not None
    default = np.full(by_group, shape.default_zero)
    zeros = default if weights.zero_points is None else weights.zero_points
    stored = weights.scales.astype(shape.scale_dtype)

    def spread(per: np.ndarray) -> np.ndarray:
        by_row = per.reshape(by_group).astype(np.float64)
        return np.repeat(by_row, shape.group_size or shape.k, axis=1)[:, : shape.k]

    centred = values(shape, weights.weight) - spread(zeros)
    return np.asarray(centred * spread(stored))
