"""Kernels that work on each row of activations alone: norms, activation functions, quantization."""

from __future__ import annotations

from slmtvm.schedules.rows import by_block, pair, rescale
from slmtvm.schedules.rows.op import GATED, GLUS, RowOp
from slmtvm.schedules.rows.pair import Pair
from slmtvm.schedules.rows.reference import reference
from slmtvm.schedules.rows.template import build
from slmtvm.schedules.rows.tensor import build_quantize_tensor

__all__ = [
    "GATED",
    "GLUS",
    "Pair",
    "RowOp",
    "build",
    "build_quantize_tensor",
    "by_block",
    "pair",
    "reference",
    "rescale",
]
