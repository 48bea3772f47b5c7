"""The operators that the importer knows, one table for all."""

from __future__ import annotations

from slmtvm.importer.operators import (  # noqa: F401  (imported to fill the registry)
    contraction,
    control,
    convolution,
    elementwise,
    experts,
    four_bit_floats,
    fused,
    movement,
    quantization,
    reduction,
)
from slmtvm.importer.operators.registry import Kind, Operator, find, registered

__all__ = ["MAX_OPSET", "MIN_OPSET", "Kind", "Operator", "find", "registered"]

MIN_OPSET, MAX_OPSET = 7, 28  # of ai.onnx, whose meanings the table has been checked against
