"""Operators of quantized graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slmtvm.importer.graph import Array, Quantization, dequantize
from slmtvm.importer.operators.registry import INT, Attrs, Kind, Shape, register

_UINT8_STEPS = 255


def _first_shape(_attrs: Attrs, shapes: Sequence[Any], _constants: Sequence[Any]) -> list[Shape]:
    return [shapes[0]]


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
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((high - low) / _UINT8_STEPS) or np.float32(1)
    zero = np.uint8(np.clip(np.rint(-low / scale), 0, _UINT8_STEPS))
    quantized = np.clip(np.rint(x / scale) + zero, 0, _UINT8_STEPS).astype(np.uint8)
    return quantized, np.asarray(scale), np.asarray(zero)


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
