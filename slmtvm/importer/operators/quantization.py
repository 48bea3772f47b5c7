"""Operators of quantized graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from slmtvm.importer.graph import Array, Quantization, dequantize, spread
from slmtvm.importer.operators.registry import INT, Attrs, Kind, Shape, register

_UINT8_STEPS = 255


def _first_shape(_attrs: Attrs, shapes: Sequence[Any], _constants: Sequence[Any]) -> list[Shape]:
    return [shapes[0]]


_LINEAR: dict[str, Any] = {
    "shapes": _first_shape,
    "arity": (2, 3),
    "attributes": {"axis": (INT, False), "block_size": (INT, False)},
}


@register(
    "DequantizeLinear",
    1,
    Kind.ELEMENTWISE,
    "com.microsoft",
    result=lambda dtypes, _: dtypes[1],
    **_LINEAR,
)
@register(
    "DequantizeLinear",
    10,
    Kind.ELEMENTWISE,
    shapes=_first_shape,
    result=lambda dtypes, _: dtypes[1],
)
def dequantize_linear(
    attrs: Attrs, x: Array, scales: Array, zero_points: Array | None = None
) -> Any:
    quantization = Quantization(
        scales, zero_points, attrs.get("axis", 1), attrs.get("block_size", 0)
    )
    return dequantize(x, quantization).astype(scales.dtype)


def _levels_dtype(dtypes: Sequence[Any], attrs: Attrs) -> np.dtype[Any]:
    if len(dtypes) > 2 and dtypes[2] is not None:
        return np.dtype(dtypes[2])
    asked = attrs.get("output_dtype", 0)
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(asked) if asked else np.uint8)


@register("QuantizeLinear", 1, Kind.ROUND, "com.microsoft", result=_levels_dtype, **_LINEAR)
@register("QuantizeLinear", 10, Kind.ROUND, shapes=_first_shape, result=_levels_dtype)
def quantize_linear(attrs: Attrs, x: Array, scales: Array, zero_points: Array | None = None) -> Any:
    """``x / scale`` rounded half to even, plus the zero point, within the type.

    What is no number becomes the least number of the type, as in onnxruntime.
    """
    dtype = _levels_dtype([None, None, None if zero_points is None else zero_points.dtype], attrs)
    if dtype.kind not in "iu":
        raise ValueError(f"rounding to {dtype} is not supported")
    axis, block = attrs.get("axis", 1), attrs.get("block_size", 0)
    ratio = x.astype(np.float32) / spread(scales, x.shape, axis, block).astype(np.float32)
    zeros = 0 if zero_points is None else spread(zero_points, x.shape, axis, block)
    limits = np.iinfo(dtype)
    levels = np.rint(ratio.astype(np.float64)) + zeros
    return np.clip(np.nan_to_num(levels, nan=-np.inf), limits.min, limits.max).astype(dtype)


def _dynamic_shapes(_attrs: Attrs, shapes: Sequence[Any], _constants: Sequence[Any]) -> list[Shape]:
    return [shapes[0], (), ()]


@register(
    "DynamicQuantizeLinear",
    11,
    Kind.QUANTIZE,
    shapes=_dynamic_shapes,
    result=lambda *_: (np.dtype(np.uint8), np.dtype(np.float32), np.dtype(np.uint8)),
)
def dynamic_quantize_linear(_attrs: Attrs, x: Array) -> Any:
    # In float32 throughout, as onnxruntime has it: a range may overflow. NaN is in no range.
    low = np.fmin.reduce(x, axis=None, initial=np.float32(0))
    high = np.fmax.reduce(x, axis=None, initial=np.float32(0))
    scale = (high - low) / np.float32(_UINT8_STEPS) if high != low else np.float32(1)
    ideal = np.nan_to_num(-low / scale, nan=_UINT8_STEPS)
    zero = np.asarray(np.rint(np.clip(ideal, 0, _UINT8_STEPS)), np.uint8)
    return quantize_linear({}, x, np.asarray(scale), zero), np.asarray(scale), zero


def _lookup_shapes(attrs: Attrs, shapes: Sequence[Any], constants: Sequence[Any]) -> list[Shape]:
    table = shapes[0]
    if attrs.get("gather_axis", 0) != 0 or len(table) != 2:
        raise ValueError(f"rows are looked up in a table of shape {list(table)}")
    per_byte = 8 // attrs.get("bits", 4) if constants[0].packed is None else 1
    return [(*shapes[1], table[1] * per_byte)]


@register(
    "GatherBlockQuantized",
    1,
    Kind.LOOKUP,
    "com.microsoft",
    shapes=_lookup_shapes,
    arity=(3, 4),
    attributes={
        "gather_axis": (INT, False),
        "quantize_axis": (INT, False),
        "block_size": (INT, False),
        "bits": (INT, False),
    },
    result=lambda dtypes, _: dtypes[2],
)
def gather_block_quantized(_attrs: Attrs, *_inputs: Array) -> Any:
    raise ValueError("a lookup of constant rows in a quantized table is not supported")
