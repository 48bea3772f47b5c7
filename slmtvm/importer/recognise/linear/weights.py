"""Constants of the file as canonical weights: bits as they are wherever a format holds them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.graph import (
    Array,
    Constant,
    Quantization,
    dequantize,
    transposed,
    unpack_nibbles,
)
from slmtvm.importer.recognise.steps import Param, Weights
from slmtvm.ir.reference.weights import dequantize as expanded_weights
from slmtvm.schedules.linear.packed_rows import pack_rows
from slmtvm.schedules.linear.shape import GROUP_SIZES, MIN_GROUP_CHANNELS, stored_group

Note = Callable[[str], None]

_HALF_BYTE_OFFSET = 0x88  # adds 8 to both nibbles of a byte, modulo 16
SCALE_BYTES = FLOAT_BYTES = 4

_INTEGERS = (np.int8, np.uint8, np.int16, np.uint16)
_FLOATS = {
    np.dtype(np.float32): "f32",
    np.dtype(np.float16): "f16",
    np.dtype(ml_dtypes.bfloat16): "bf16",
}
_FLOAT8 = {
    np.dtype(ml_dtypes.float8_e4m3fn): "e4m3fn",
    np.dtype(ml_dtypes.float8_e4m3fnuz): "e4m3fnuz",
    np.dtype(ml_dtypes.float8_e5m2): "e5m2",
    np.dtype(ml_dtypes.float8_e5m2fnuz): "e5m2fnuz",
}


def linear_weights(constant: Constant, where: str, note: Note, *, dividing: int = 0) -> Weights:
    """The weight of ``x @ constant`` with constant (k, n), output features first.

    Where blocks of output features share scales, and ``dividing`` is not 0, their size divides it.
    What no canonical format holds is expanded to float32, which ``note`` is told. Raises
    UnsupportedOpError for element types that are no numbers.
    """
    turned = _scaled(transposed(constant))
    blocks = _blocks_of_rows(turned)
    fitting = None if blocks is None else blocks.divided(turned.shape[0], dividing)
    if fitting is not None:
        return _in_blocks(turned, fitting, where)
    return kernel_groups(_matrix(turned, where, note), turned.shape[1], note)


def table_weights(constant: Constant, where: str, note: Note) -> Weights:
    """The table (rows, dim) of an embedding; as for ``linear_weights``."""
    table = _scaled(constant)
    blocks = _blocks_of_rows(table)
    if blocks is None:
        return _matrix(table, where, note)
    # As a layer that shares the table has them, where it can.
    return _in_blocks(table, blocks.divided(table.shape[0], 0) or blocks, where)


def _scaled(constant: Constant) -> Constant:
    """``constant``; with a scale of 1 where it is a float8 or integers as floats, without one, as
    their formats have one."""
    bare = constant.stored.dtype in _FLOAT8 or constant.by_cast
    if not bare or constant.quantization is not None:
        return constant
    return replace(constant, quantization=Quantization(np.ones((), np.float32), None, 0, 0))


def _has_format(constant: Constant) -> bool:
    """Whether a canonical format holds these numbers, which have scales."""
    if constant.stored.dtype in _FLOAT8:
        zeros = None if constant.quantization is None else constant.quantization.zero_points
        return zeros is None or not zeros.astype(np.float32).any()
    return constant.packed is not None or constant.stored.dtype in _INTEGERS


def _matrix(constant: Constant, where: str, note: Note) -> Weights:
    """A matrix of which each row has its own scales, or none."""
    dtype, name = constant.stored.dtype, constant.name
    if constant.quantization is None:
        if dtype not in _FLOATS:
            return _expanded(constant, where, note)
        if dtype == ml_dtypes.bfloat16:
            _check_finite(constant, where)
            return Weights("bf16", Param(name, constant.stored.view(np.uint16)))
        if constant.narrow and dtype == np.float32:
            note(_widening_note(f"weight {name!r}", constant.narrow, constant.stored.size))
        return Weights(_FLOATS[dtype], Param(name, constant.stored))
    found = _scales(constant.quantization, constant.shape)
    if found is None or not _has_format(constant):
        return _expanded(constant, where, note)
    scales, zeros, group = found
    return replace(_quantized(constant, scales, zeros, where), group_size=group)


def _quantized(constant: Constant, scales: Array, zeros: Array | None, where: str) -> Weights:
    """A matrix of 4, 8 or 16 bits with its scales and zero points, whatever these belong to."""
    if constant.packed is not None:
        return _packed(constant, scales, zeros)
    name, dtype = constant.name, constant.stored.dtype
    if dtype in _FLOAT8:
        _check_finite(constant, where)
        weight = Param(name, constant.stored.view(np.uint8))
        return Weights(_FLOAT8[dtype], weight, Param(f"{name}.scales", scales))
    return Weights(
        f"int{8 * dtype.itemsize}",
        Param(name, to_signed(constant.stored, where)),
        Param(f"{name}.scales", scales),
        _param(signed_zero_points(zeros, dtype, scales.shape), f"{name}.zero_points"),
    )


def _packed(constant: Constant, scales: Array, zeros: Array | None) -> Weights:
    """A matrix of 4-bit values; signed ones are stored plus 8, which is int4's default offset."""
    assert constant.packed is not None
    rows, columns = constant.packed
    if columns % 2:  # in the file rows begin within a byte
        unsigned = replace(constant, signed=False)
        stored = pack_rows(unpack_nibbles(unsigned), 4)
    else:
        stored = constant.stored.reshape(rows, columns // 2)
    name = constant.name
    return Weights(
        "int4",
        Param(name, stored ^ np.uint8(_HALF_BYTE_OFFSET) if constant.signed else stored),
        Param(f"{name}.scales", scales),
        _param(int4_zero_points(zeros, constant.signed, scales.shape), f"{name}.zero_points"),
    )


def _expanded(constant: Constant, where: str, note: Note) -> Weights:
    dtype = constant.stored.dtype
    if dtype.kind in "OSUbc":
        raise UnsupportedOpError(
            f"weight {constant.name!r} is {dtype}; floats and integers are supported", where=where
        )
    stored = constant.stored if constant.packed is None else unpack_nibbles(constant)
    quantization = constant.quantization
    values = stored if quantization is None else dequantize(stored, quantization)
    what = "int4" if constant.packed is not None else str(dtype)
    layout = "" if quantization is None else f" with {_layout(quantization)}"
    what = f"weight {constant.name!r} ({what}{layout})"
    note(_expansion_note(what, constant.stored, values.size))
    return Weights("f32", Param(constant.name, values.astype(np.float32)))


def _expansion_note(what: str, stored: Array, count: int) -> str:
    return f"{_widening_note(what, stored.nbytes, count)}: no kernel reads it as it is"


def _widening_note(what: str, narrow: int, count: int) -> str:
    size = count * FLOAT_BYTES
    return (
        f"{what} is expanded to float32, {size / narrow:.3g} times its size "
        f"({size - narrow:,} bytes more)"
    )


def _layout(quantization: Quantization) -> str:
    if quantization.scales.size == 1:
        return "one scale"
    kind = "blocks" if quantization.block_size else "scales"
    return f"{kind} along axis {quantization.axis}"


def _check_finite(constant: Constant, where: str) -> None:
    if not np.isfinite(constant.stored.astype(np.float32)).all():
        raise InvalidModelError(f"weight {constant.name!r} holds NaN or infinities", where=where)


def kernel_groups(weights: Weights, columns: int, note: Note) -> Weights:
    """``weights`` of a linear layer in groups that kernels have: scales repeated, bits kept.

    int2 and int4 weights without groups get some. Groups of another size are divided where that
    gives some that activations in int8 can have as well, and else are as they are. Those that with
    their scales take no less than float32 are expanded.
    """
    group, scales = weights.group_size, weights.scales
    if scales is None or weights.group_channels or group in GROUP_SIZES:
        return weights
    if not group and weights.bits >= 8:
        return weights
    rows = len(weights.weight.array)
    if not group or group >= columns:
        # One scale a row, or for all: the groups that take the fewest bytes with their padding.
        sizes = GROUP_SIZES[::-1]
        size = min(sizes, key=lambda s: -(-columns // s) * (s * weights.bits // 8 + SCALE_BYTES))
    else:
        size = max((s for s in GROUP_SIZES if group % s == 0), default=group)
    if stored_group(size, weights.bits) * weights.bits // 8 + SCALE_BYTES >= size * FLOAT_BYTES:
        what = f"weight {weights.weight.name!r} ({weights.format} in blocks of {group})"
        note(_expansion_note(what, weights.weight.array, rows * columns))
        return _unpacked(weights, columns)
    if size == group:
        return weights
    groups = -(-columns // size)

    def spread(param: Param | None) -> Param | None:
        if param is None:
            return None
        array = np.broadcast_to(param.array, (rows,)) if param.array.size == 1 else param.array
        times = group // size if group and group < columns else groups
        wide = np.repeat(array.reshape(rows, -1), times, axis=1)[:, :groups]
        return Param(f"{param.name}/{size}", np.ascontiguousarray(wide))

    return replace(
        weights, scales=spread(scales), zero_points=spread(weights.zero_points), group_size=size
    )


def _unpacked(weights: Weights, columns: int) -> Weights:
    """Grouped weights as float32."""
    zeros = weights.zero_points
    values = expanded_weights(
        weights.weight.array,
        None if weights.scales is None else weights.scales.array,
        None if zeros is None else zeros.array,
        format=weights.format, group_size=weights.group_size, columns=columns,
    )  # fmt: skip
    return Weights("f32", Param(weights.weight.name, values))


def to_signed(stored: Array, where: str) -> Array:
    """8- or 16-bit values as signed ones; unsigned ones less half their range, and so must be their
    zero points."""
    if stored.dtype in (np.int8, np.int16):
        return stored
    if stored.dtype not in (np.uint8, np.uint16):
        raise UnsupportedOpError(f"quantized weights of type {stored.dtype}", where=where)
    top = stored.dtype.type(1 << (8 * stored.dtype.itemsize - 1))
    return (stored ^ top).view(f"i{stored.dtype.itemsize}")


def signed_zero_points(
    zeros: Array | None, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> Array | None:
    """Zero points for ``to_signed`` values of ``dtype``, of the scales' shape; None where all are
    0."""
    if zeros is None:
        zeros = np.zeros((), dtype)
    half = 1 << (8 * dtype.itemsize - 1) if dtype.kind == "u" else 0
    shifted = zeros.astype(np.int32) - half
    if not shifted.any():
        return None
    signed = shifted.astype(f"i{dtype.itemsize}")
    return np.broadcast_to(signed.reshape(_fit(zeros, shape)), shape)


def int4_zero_points(zeros: Array | None, signed: bool, shape: tuple[int, ...]) -> Array | None:
    """Zero points for values stored with offset 8; None where all are 8."""
    if zeros is None:
        zeros = np.zeros((), np.int8 if signed else np.uint8)
    shifted = zeros.astype(np.int16) + (8 if signed else 0)
    if (shifted == 8).all():
        return None
    return np.broadcast_to(shifted.astype(np.uint8).reshape(_fit(zeros, shape)), shape)


def _fit(zeros: Array, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * len(shape) if zeros.size == 1 else shape


def _param(array: Array | None, name: str) -> Param | None:
    return None if array is None else Param(name, array)


def _scales(
    quantization: Quantization, shape: tuple[int, ...]
) -> tuple[Array, Array | None, int] | None:
    """Scales (float32) and zero points as (1,), (rows,) or (rows, groups), and the group size.

    None where they change along the rows in another way.
    """
    rows, _ = shape
    scales, zeros = quantization.scales.astype(np.float32, copy=False), quantization.zero_points
    if scales.size == 1:
        return scales.reshape(1), None if zeros is None else zeros.reshape(1), 0
    along_rows = quantization.axis % 2 == 1
    if quantization.block_size:
        return (scales, zeros, quantization.block_size) if along_rows else None
    if along_rows:
        return None
    return scales.reshape(rows), None if zeros is None else zeros.reshape(rows), 0


@dataclass(frozen=True)
class _Blocks:
    """Scales (float32) and zero points, or one for all, of so many rows: (blocks, columns)."""

    scales: Array
    zeros: Array | None
    size: int

    def divided(self, rows: int, dividing: int) -> _Blocks | None:
        """These in blocks of a size that linear layers have, see ``linear_weights``."""
        block = self.size
        if block >= rows:  # any size from there on
            block = max(MIN_GROUP_CHANNELS, 1 << (rows - 1).bit_length())
        size = math.gcd(block & -block, dividing)  # the largest power of two in it
        if size < MIN_GROUP_CHANNELS:
            return None

        def spread(per: Array) -> Array:
            fine = np.repeat(per, block // size, axis=0)
            return np.ascontiguousarray(fine[: -(-rows // size)])

        zeros = self.zeros
        wide = None if zeros is None else zeros if zeros.size == 1 else spread(zeros)
        return _Blocks(spread(self.scales), wide, size)


def _blocks_of_rows(constant: Constant) -> _Blocks | None:
    """The blocks of rows that share scales in a matrix that a canonical format holds; None where
    there are none."""
    quantization, (rows, columns) = constant.quantization, constant.shape
    if quantization is None or quantization.scales.size == 1 or not _has_format(constant):
        return None
    along_rows = quantization.axis % 2 == 1
    if along_rows == bool(quantization.block_size):
        return None
    scales, zeros = quantization.scales.astype(np.float32, copy=False), quantization.zero_points
    if zeros is not None and zeros.size > 1:
        zeros = zeros.reshape(-1, columns)
    # Without blocks there is a scale for each column.
    return _Blocks(scales.reshape(-1, columns), zeros, quantization.block_size or rows)


def _in_blocks(constant: Constant, blocks: _Blocks, where: str) -> Weights:
    weights = _quantized(constant, blocks.scales, blocks.zeros, where)
    return replace(weights, group_channels=blocks.size)
