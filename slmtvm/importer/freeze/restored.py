"""Weights that a file restores from integers by Cast, Sub and Mul instead of DequantizeLinear.

They stay integers with scales and zero points, as those of DequantizeLinear do. What such a form
does not hold is computed in float, and remembers how many bytes the file has for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from slmtvm.importer.graph import Array, Constant, Quantization
from slmtvm.importer.rewrite.halves import is_half

_BYTES = (np.int8, np.uint8)
_FLOAT = np.dtype(np.float32)


def cast_levels(constant: Constant, dtype: np.dtype[np.generic]) -> Constant | None:
    """A matrix of integers of 4 or 8 bits as floats; None for anything else."""
    small = constant.packed is not None or constant.stored.dtype in _BYTES
    if dtype != _FLOAT or not small or len(constant.shape) < 2 or constant.quantization:
        return None
    return replace(constant, dtype=dtype, by_cast=True)


def computed(op_type: str, given: Sequence[Constant | None]) -> Constant | None:
    """A Sub or Mul of restored integers and a constant for all of them or for each along one axis;
    None where it is anything else."""
    if len(given) != 2 or given[0] is None or given[1] is None:
        return None
    weight, other = given[0], given[1]
    if op_type == "Mul" and other.by_cast:
        weight, other = other, weight
    if not weight.by_cast or other.by_cast or op_type not in ("Mul", "Sub"):
        return None
    if other.stored.dtype != _FLOAT and not is_half(other.stored.dtype):
        return None
    found = _along_one_axis(other.values(table=True).astype(np.float32), weight.shape)
    if found is None:
        return None
    values, axis = found
    old = weight.quantization or Quantization(np.ones((), np.float32), None, axis, 0)
    if op_type == "Sub":
        if weight.quantization is not None:
            return None
        zeros = values.astype(_level_dtype(weight))
        if (zeros != values).any():
            return None
        scales = np.broadcast_to(old.scales, zeros.shape)
        return replace(weight, quantization=Quantization(scales, zeros, axis, 0))
    if values.size > 1 and old.scales.size > 1 and axis != old.axis:
        return None
    scales = np.asarray(old.scales * values, np.float32)
    wide = None if old.zero_points is None else np.broadcast_to(old.zero_points, scales.shape)
    axis = axis if values.size > 1 else old.axis
    return replace(weight, quantization=Quantization(scales, wide, axis, 0))


def _along_one_axis(values: Array, shape: tuple[int, ...]) -> tuple[Array, int] | None:
    """``values``, which are broadcast to ``shape``, as () or as a vector along an axis."""
    wide = (1,) * (len(shape) - values.ndim) + values.shape
    axes = [axis for axis, size in enumerate(wide) if size != 1]
    if len(wide) != len(shape) or len(axes) > 1 or any(wide[a] != shape[a] for a in axes):
        return None
    return (values.reshape(-1), axes[0]) if axes else (values.reshape(()), 0)


def _level_dtype(weight: Constant) -> np.dtype[np.generic]:
    if weight.packed is None:
        return weight.stored.dtype
    return np.dtype(np.int8 if weight.signed else np.uint8)


def narrow_bytes(given: Sequence[Constant | None], result: Array) -> int:
    """Bytes that the file has for a ``result`` that is computed from narrow integers; else 0."""
    for constant in given:
        if constant is None or int(np.prod(constant.shape, dtype=np.int64)) != result.size:
            continue
        if constant.narrow:
            return constant.narrow
        small = constant.stored.dtype in _BYTES or constant.packed is not None
        if small and constant.stored.nbytes < result.nbytes:
            return constant.stored.nbytes
    return 0
