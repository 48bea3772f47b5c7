"""Whole multiples of one step as whole multiples of another, rounded as onnxruntime does it.

QLinearMatMul and QGemm multiply sums of integers by the ratio of both steps in float32, which
rounds what lies half-way between two steps of the result otherwise than the sums as floats.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from slmtvm.schedules.rows.pair import FARTHEST

Array = npt.NDArray[Any]

COUNTED = float(1 << 22)
"""Multiples below which a float32 says which one it is, whatever its last bits; others are kept."""


def reference(x: Array, steps: Array, unit: float) -> Array:
    """x float32 (m, d), multiples of ``steps`` (d,) but for roundings, as multiples of ``unit``."""
    ratio = x / steps
    count = np.where(np.abs(ratio) < COUNTED, np.rint(ratio), ratio)
    ideal = np.clip(count * (steps / np.float32(unit)), -FARTHEST, FARTHEST)
    return np.asarray(np.rint(ideal) * np.float32(unit), np.float32)
