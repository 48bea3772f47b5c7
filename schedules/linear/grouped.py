"""Linear layers with int4 or int8 weights and int8 activations, both scaled by group of k.

``y = sum over groups g of fma(float(sum_k q a) - z[g] xsum[g], s[g] xs[g], y)``, then ``+ bias +
residual``; the bracket is an integer, and exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import Dot, Isa
from slmtvm.schedules.isa.base import PANEL, Buffer, Expr, let, load, splat
from slmtvm.schedules.kernel import Kernel, Tensor
from slmtvm.schedules.linear.integer import Operands, integer_sums
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace, tile_knobs, tile_space
from slmtvm.schedules.linear.packing import (
    pad,
    panels_of_bytes,
    panels_of_nibbles,
    panels_of_rows,
    unpack_nibbles,
)
from slmtvm.schedules.linear.shape import LinearShape
from slmtvm.schedules.linear.tile import Frame, Registers, Store, Tile, define_tiled


def weight_tensors(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """weight: bytes (panels, padded_k * bits / 8, 16); scales and zero_points: (panels, groups,
    16), the latter bytes or float32."""
    dtype = _byte_dtype(shape)
    by_group = (shape.panels, shape.groups, PANEL)
    tensors = [
        Tensor("weight", (shape.panels, shape.padded_k * shape.bits // 8, PANEL), dtype),
        Tensor("scales", by_group, shape.scale_dtype),
    ]
    zero_dtype = "float32" if shape.float_zero_points else dtype
    return tensors + [Tensor("zero_points", by_group, zero_dtype)] * shape.has_zero_points


def pack(
    shape: LinearShape,
    isa: Isa,
    weight: np.ndarray,
    scales: np.ndarray | None,
    zero_points: np.ndarray | None,
) -> list[np.ndarray]:
    """int4: weight uint8 (n, ceil(k / 2)), low nibble first; int8: int8 (n, k); others: bytes.

    scales float (n, groups); zero_points of the same shape, uint8 for int4 and int8 for int8, or
    floats. Padding counts as zero: it holds the zero point, and where that is a float, activations
    are padded with zeros.
    """
    assert scales is not None
    rows = shape.panels * PANEL
    packed_scales = pad(scales.reshape(shape.n, shape.groups), rows, shape.groups)
    byte = np.dtype(_byte_dtype(shape))
    zero_dtype = np.dtype(np.float32) if shape.float_zero_points else byte
    zeros = np.full(packed_scales.shape, _default_zero(shape), zero_dtype)
    if zero_points is not None:
        zeros[: shape.n] = zero_points.reshape(shape.n, shape.groups)
    quantized = unpack_nibbles(weight, shape.k) if shape.format == "int4" else weight.view(byte)
    padding = np.zeros_like(zeros, byte) if shape.float_zero_points else zeros
    whole = np.repeat(padding, shape.padded_k // shape.groups, axis=1)
    whole[: shape.n, : shape.k] = quantized
    to_panels = panels_of_nibbles if shape.format == "int4" else panels_of_bytes
    arrays = [
        to_panels(whole, isa.k_step).reshape(weight_tensors(shape, isa)[0].shape),
        panels_of_rows(packed_scales.astype(shape.scale_dtype)),
    ]
    return arrays + [panels_of_rows(zeros)] * shape.has_zero_points


def build(shape: LinearShape, isa: Isa, knobs: Knobs, frame: Frame = define_tiled) -> Kernel:
    """Tensors: xq int8 (m, padded_k), xs and xsum float32 (m, groups), weights, [bias],
    [residual], y."""
    by_group = (shape.m, shape.groups)
    inputs = [
        Tensor("xq", (shape.m, shape.padded_k), "int8"),
        Tensor("xs", by_group, "float32"),
        Tensor("xsum", by_group, "float32"),
        *weight_tensors(shape, isa),
    ]
    dot = _dot(shape, isa, min(knobs["mr"], shape.m))

    def emit(tile: Tile, buffers: list[Buffer], store: Store) -> None:
        named = dict(zip((t.name for t in inputs), buffers, strict=True))
        sums = Registers("float32", isa.lanes, tile.rows * tile.vectors)
        with T.serial(shape.groups) as group:
            _add_group(shape, tile, dot, knobs, named, group, sums)
        for row, v in tile.cells():
            store.add_and_write(tile, row, v, sums[row * tile.vectors + v])

    return frame(shape, isa, knobs, inputs, emit)


def _add_group(
    shape: LinearShape,
    tile: Tile,
    dot: Dot,
    knobs: Knobs,
    named: dict[str, Buffer],
    group: Expr,
    sums: Registers,
) -> None:
    isa = tile.isa
    size = shape.group_size
    panel_bytes = size * PANEL * shape.bits // 8
    operands = Operands(
        dot,
        shape.bits,
        named["weight"],
        lambda v: (tile.panel(v) * shape.groups + group) * panel_bytes,
        named["xq"],
        lambda row: tile.row(row) * shape.padded_k + group * size,
        ahead=knobs["pf"] * knobs["nv"] * shape.groups * panel_bytes // isa.vectors,
    )
    integers = integer_sums(tile, operands, size, knobs["ku"])

    def by_channel(name: str, v: int) -> Expr:
        at = (tile.panel(v) * shape.groups + group) * PANEL + tile.lane(v)
        return load(named[name], at, isa.lanes)

    scales = []
    corrections = []
    for v in range(tile.vectors):
        halves = by_channel("scales", v)
        scales.append(let(isa.f16_to_f32(halves) if shape.scale_dtype == "float16" else halves))
        corrections.append(_minus_zero_point(shape, isa, dot, by_channel, v))
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


def _minus_zero_point(
    shape: LinearShape, isa: Isa, dot: Dot, by_channel: Callable[[str, int], Expr], v: int
) -> Expr | None:
    """What a channel's sum takes for each unit of the activations' sum; None where nothing."""
    if shape.float_zero_points:
        return let(splat(float(-dot.offset), "float32", isa.lanes) - by_channel("zero_points", v))
    if shape.has_zero_points:
        wide = T.Cast(f"int32x{isa.lanes}", by_channel("zero_points", v))
        exact = T.Cast(f"float32x{isa.lanes}", let(splat(-dot.offset, "int32", isa.lanes) - wide))
        return let(exact)
    zero = _default_zero(shape) + dot.offset
    return splat(float(-zero), "float32", isa.lanes) if zero else None


def _default_zero(shape: LinearShape) -> int:
    return 8 if shape.format == "int4" else 0


def _byte_dtype(shape: LinearShape) -> str:
    return "int8" if shape.format == "int8" else "uint8"


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    return {**tile_space(isa), "ku": (16, 32, 64, 128)}


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    registers = len(_dot(shape, isa, shape.m).state) + 1  # a cell's integer sums and its float sum
    # Rows whose activations take registers compete with the sums for them.
    tile = tile_knobs(shape, isa, registers, max_rows=4 if isa.row_in_registers else 8)
    return {**tile, "ku": 32, "pf": int(shape.m == 1)}


def _dot(shape: LinearShape, isa: Isa, rows: int) -> Dot:
    return isa.u4_s8(rows) if shape.format == "int4" else isa.s8_s8()


def reference(
    shape: LinearShape,
    xq: np.ndarray,
    xs: np.ndarray,
    xsum: np.ndarray,
    weight: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """float64 y (m, n); weight, scales and zero_points as ``pack`` takes them."""
    q = weight if shape.format == "int8" else unpack_nibbles(weight, shape.k)
    by_group = (shape.n, shape.groups)
    zeros = np.full(by_group, _default_zero(shape)) if zero_points is None else zero_points
    stored = scales.reshape(by_group).astype(shape.scale_dtype).astype(np.float64)
    centred = (
        q.astype(np.float64)
        - np.repeat(zeros.reshape(by_group).astype(np.float64), shape.group_size, axis=1)[
            :, : shape.k
        ]
    )
    w = centred * np.repeat(stored, shape.group_size, axis=1)[:, : shape.k]
    x = xq.astype(np.float64) * np.repeat(xs.astype(np.float64), shape.group_size, axis=1)
    y = x[:, : shape.k] @ w.T
    y = y if bias is None else y + bias
    return y if residual is None else y + residual
