"""Constants of the file as canonical weights: reshaped views, bits as they are."""

from __future__ import annotations

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.graph import Array, Constant, Quantization, unpack_nibbles
from slmtvm.importer.steps import Param, Weights

_HALF_BYTE_OFFSET = 0x88  # adds 8 to both nibbles of a byte, modulo 16
_BYTE_OFFSET = 0x80


def linear_weights(constant: Constant, where: str) -> Weights:
    """The weight of ``x @ constant`` with constant (k, n), output features first.

    Raises UnsupportedOpError for element types that no canonical format holds.
    """
    k, n = constant.shape
    quantization = constant.quantization
    if quantization is None:
        return Weights(_float_format(constant, where), Param(constant.name, constant.stored.T))
    stored = constant.stored
    if constant.packed is not None:
        stored = unpack_nibbles(constant)
        weight = Param(constant.name, pack_nibbles(_unsigned_nibbles(stored, constant).T))
    else:
        weight = Param(constant.name, to_int8(stored, where).T)
    scales, zeros, group = _scales(quantization, rows=n, columns=k, row_axis=1, where=where)
    four_bits = constant.packed is not None
    name = constant.name
    return Weights(
        "int4" if four_bits else "int8",
        weight,
        Param(f"{name}.scales", scales),
        _zero_points(zeros, scales, stored.dtype, four_bits, f"{name}.zero_points"),
        group,
    )


def table_weights(constant: Constant, where: str) -> Weights:
    """The table (rows, dim) of an embedding."""
    rows, dim = constant.shape
    quantization = constant.quantization
    if quantization is None:
        return Weights(_float_format(constant, where), Param(constant.name, constant.stored))
    name = constant.name
    scales, zeros, group = _scales(quantization, rows=rows, columns=dim, row_axis=0, where=where)
    if constant.packed is not None:
        return packed_table(constant, scales, zeros, group, where)
    return Weights(
        "int8",
        Param(name, to_int8(constant.stored, where)),
        Param(f"{name}.scales", scales),
        _zero_points(zeros, scales, constant.stored.dtype, False, f"{name}.zero_points"),
        group,
    )


def packed_table(
    constant: Constant, scales: Array, zeros: Array | None, group: int, where: str
) -> Weights:
    """A table of 4-bit values; signed ones are stored plus 8, which is int4's default offset."""
    assert constant.packed is not None
    rows, dim = constant.packed
    if dim % 2:
        raise UnsupportedOpError(f"4-bit rows of odd width {dim} are not supported", where=where)
    stored = constant.stored.reshape(rows, dim // 2)
    values = stored ^ np.uint8(_HALF_BYTE_OFFSET) if constant.signed else stored
    dtype = np.dtype(np.int8 if constant.signed else np.uint8)
    name = constant.name
    return Weights(
        "int4",
        Param(name, values),
        Param(f"{name}.scales", scales),
        _zero_points(zeros, scales, dtype, True, f"{name}.zero_points"),
        group,
    )


def to_int8(stored: Array, where: str) -> Array:
    """8-bit values as int8; uint8 values are shifted by 128, and so must be their zero points."""
    if stored.dtype == np.int8:
        return stored
    if stored.dtype == np.uint8:
        return (stored ^ np.uint8(_BYTE_OFFSET)).view(np.int8)
    raise UnsupportedOpError(f"quantized weights of type {stored.dtype}", where=where)


def int8_zero_points(zeros: Array | None, unsigned: bool, shape: tuple[int, ...]) -> Array | None:
    """Zero points for ``to_int8`` values, of the scales' shape; None where all are 0."""
    if zeros is None:
        zeros = np.zeros((), np.uint8 if unsigned else np.int8)
    shifted = zeros.astype(np.int16) - (128 if unsigned else 0)
    if not shifted.any():
        return None
    return np.broadcast_to(shifted.astype(np.int8).reshape(_fit(zeros, shape)), shape)


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


def _zero_points(
    zeros: Array | None, scales: Array, dtype: np.dtype[np.generic], four_bits: bool, name: str
) -> Param | None:
    if four_bits:
        shifted = int4_zero_points(zeros, dtype == np.int8, scales.shape)
    else:
        shifted = int8_zero_points(zeros, dtype == np.uint8, scales.shape)
    return None if shifted is None else Param(name, shifted)


def _float_format(constant: Constant, where: str) -> str:
    if constant.stored.dtype == np.float32:
        return "f32"
    if constant.stored.dtype == np.float16:
        return "f16"
    raise UnsupportedOpError(
        f"weight {constant.name!r} is {constant.stored.dtype}; float32, float16, int8 and int4 "
        "weights are supported",
        where=where,
    )


def _scales(
    quantization: Quantization, *, rows: int, columns: int, row_axis: int, where: str
) -> tuple[Array, Array | None, int]:
    """Scales and zero points as (1,), (rows,) or (rows, groups), and the group size."""
    scales, zeros = quantization.scales, quantization.zero_points
    if scales.size == 1:
        return scales.reshape(1), None if zeros is None else zeros.reshape(1), 0
    axis = quantization.axis % 2
    if quantization.block_size:
        if axis == row_axis or scales.ndim != 2:
            raise UnsupportedOpError("weights blocked along output features", where=where)
        turned = scales if row_axis == 0 else scales.T
        if turned.shape != (rows, -(-columns // quantization.block_size)):
            raise InvalidModelError(f"scales of shape {list(scales.shape)}", where=where)
        turned_zeros = zeros if zeros is None or row_axis == 0 else zeros.T
        return turned, turned_zeros, quantization.block_size
    if axis != row_axis:
        raise UnsupportedOpError("weights with a scale for each input feature", where=where)
    if scales.size != rows:
        raise InvalidModelError(f"{scales.size} scales for {rows} rows", where=where)
    return scales.reshape(rows), None if zeros is None else zeros.reshape(rows), 0


def _unsigned_nibbles(values: Array, constant: Constant) -> Array:
    return (values + np.int8(8)).astype(np.uint8) if constant.signed else values


def pack_nibbles(values: Array) -> Array:
    """uint8 values 0..15 (n, k) -> uint8 (n, ceil(k / 2)), the even k in the low nibble."""
    n, k = values.shape
    padded = np.zeros((n, k + k % 2), np.uint8)
    padded[:, :k] = values
    return np.asarray(padded[:, ::2] | (padded[:, 1::2] << 4))
