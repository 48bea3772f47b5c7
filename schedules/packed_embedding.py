"""Looks up rows of an embedding table that is packed as the weight of a linear layer.

A head that shares its weight with the embedding is read in whole panels by its own kernel. A row's
pieces lie a panel apart from each other, and reading the few of one token costs little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import linear
from slmtvm.schedules import vector as vec
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.kernel import Kernel, Tensor, Work, define
from slmtvm.schedules.linear import LinearShape
from slmtvm.schedules.linear.shape import FLOAT8
from slmtvm.schedules.vector import Buffer, Expr

_READ = ("weight", "scales", "zero_points")  # of the packed weights


def readable(shape: LinearShape) -> bool:
    """Whether there is a kernel for a table packed so."""
    known = shape.format not in (*FLOAT8, "int16") and not shape.float_zero_points
    return known and not shape.group_channels


def operands(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """Those of the packed weights that the kernel takes, in order."""
    return [t for t in linear.packed_weights(shape, isa) if t.name in _READ]


def build(shape: LinearShape, isa: Isa) -> Kernel:
    """``y[i] = W[tokens[i]]``, float32 (m, k), with W as ``linear.pack`` leaves it.

    Tensors: tokens int32 (m,), ``operands``, y. The layer's activations, bias and residual are not
    read. One block for each row; token ids are not checked.
    """
    assert readable(shape), shape
    plain = replace(shape, has_bias=False, has_residual=False)
    tensors = [
        Tensor("tokens", (shape.m,), "int32"),
        *operands(shape, isa),
        Tensor("y", (shape.m, shape.k), "float32"),
    ]

    def body(row: Expr, *buffers: Buffer) -> None:
        named = dict(zip((t.name for t in tensors), buffers, strict=True))
        token = vec.load(named["tokens"], row, 1)
        if shape.bits > 8:
            _floats(shape, isa, row, token, named)
        else:
            _integers(shape, isa, row, token, named)

    sizes = {t.name: int(np.prod(t.shape)) * np.dtype(t.dtype).itemsize for t in tensors[1:-1]}
    rows = isa.panels(shape.n) * isa.panel
    touched = {name: shape.m * size // rows for name, size in sizes.items()}
    name = f"packed_embedding_{plain.kernel_name(isa.name, {})}"
    return define(name, tensors, body, grid=shape.m, outputs=["y"], work=Work(touched=touched))


def _floats(
    shape: LinearShape, isa: Isa, row: Expr, token: Expr, named: Mapping[str, Buffer]
) -> None:
    panel, lane = _place(isa, token)
    with T.serial(shape.k) as k:
        stored = vec.load(named["weight"], (panel * shape.k + k) * isa.panel + lane, 1)
        if shape.format == "f16":
            stored = vec.half_to_float(T.bind(T.reinterpret("uint16", stored)))
        elif shape.format == "bf16":  # the upper half of a float32
            wide = T.bind(T.cast(stored, "int32"))
            stored = T.bind(T.reinterpret("float32", T.shift_left(wide, T.int32(16))))
        vec.store(named["y"], row * shape.k + k, stored, 1)


def _integers(
    shape: LinearShape, isa: Isa, row: Expr, token: Expr, named: Mapping[str, Buffer]
) -> None:
    panel, lane = _place(isa, token)
    size = shape.group_size or shape.padded_k
    stored = shape.stored_group or shape.padded_k
    whole, rest = divmod(shape.k, size)

    def group(index: Expr, count: int) -> None:
        at = (panel * shape.groups + index) * isa.panel + lane
        scale = _scale(shape, named["scales"], at)
        zero = T.int32(shape.default_zero)
        if shape.has_zero_points:
            zero = T.bind(T.cast(vec.load(named["zero_points"], at, 1), "int32"))

        length = isa.k_step * 8 // shape.bits

        def piece(number: Expr, values: int) -> None:
            column = number * length
            if stored != size:  # groups before this one end within a load
                column = column - index * (stored - size)
            place = (panel, lane, number, row * shape.k + column)
            _piece(shape, isa, place, values, (scale, zero), named)

        full, left = divmod(count, length)
        first = index * (stored // length)
        with T.serial(full) as i:
            piece(first + i, length)
        if left:
            piece(first + full, left)

    with T.serial(whole) as index:
        group(index, size)
    if rest:
        group(T.int32(whole), rest)


def _piece(
    shape: LinearShape,
    isa: Isa,
    place: tuple[Expr, Expr, Expr, Expr],
    values: int,
    scale_and_zero: tuple[Expr, Expr],
    named: Mapping[str, Buffer],
) -> None:
    """The first ``values`` of k_step bytes that are together: panel, lane and number of piece, and
    where they are in y."""
    panel, lane, number, begin = place
    scale, zero = scale_and_zero
    step, bits = isa.k_step, shape.bits
    pieces = shape.padded_k * bits // 8 // step
    raw = vec.load(named["weight"], ((panel * pieces + number) * isa.panel + lane) * step, step)
    wide = T.bind(T.cast(raw, vec.dtype_of("int32", step)))
    for part in range(-(-values // step)):
        field = wide
        if bits < 8:
            moved = T.shift_right(wide, vec.splat_int(part * bits, step))
            field = T.bind(T.bitwise_and(moved, vec.splat_int((1 << bits) - 1, step)))
        centred = T.bind(field - vec.splat(zero, step))
        value = T.bind(
            T.cast(centred, vec.dtype_of("float32", step)) * vec.splat(scale, step)
        )  # fmt: skip
        rest = min(step, values - part * step)
        vec.store_part(named["y"], begin + part * step, value, rest)


def _place(isa: Isa, token: Expr) -> tuple[Expr, Expr]:
    """The panel and the lane of a channel."""
    return T.bind(T.floordiv(token, isa.panel)), T.bind(T.floormod(token, isa.panel))


def _scale(shape: LinearShape, scales: Buffer, at: Expr) -> Expr:
    stored = vec.load(scales, at, 1)
    if shape.group_size and shape.scale_dtype == "float16":
        return vec.half_to_float(T.bind(T.reinterpret("uint16", stored)))
    return stored
