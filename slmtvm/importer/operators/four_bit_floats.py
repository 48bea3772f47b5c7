"""Products with weights in bitsandbytes' types of 4 bits.

What onnxruntime's CPU kernel computes of them was found by running it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slmtvm.importer.graph import Array
from slmtvm.importer.operators.contraction import nbits_shapes
from slmtvm.importer.operators.registry import INT, Attrs, Kind, register

_FP4 = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
# Quantiles of the normal distribution, scaled to -1..1.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
TABLES = (
    np.array([*_FP4, *(-value for value in _FP4)], np.float32),
    np.array(_NF4, np.float32),
)
"""By quant_type: FP4 and NF4."""


def four_bit_floats(packed: Array, magnitudes: Array, attrs: Attrs) -> Array:
    """The weight as float32 (N, K): each value is one of a table, times the largest magnitude of
    its block of the flattened matrix. The first of a byte's two is in its upper half."""
    n, k, block = attrs["N"], attrs["K"], attrs["block_size"]
    flat = packed.reshape(-1)
    levels = np.stack([flat >> 4, flat & 15], axis=-1).reshape(-1)[: n * k]
    scales = np.repeat(magnitudes.reshape(-1).astype(np.float32), block)[: n * k]
    values: Array = (TABLES[attrs["quant_type"]][levels] * scales).reshape(n, k)
    return values


@register(
    "MatMulBnb4",
    1,
    Kind.CONTRACT,
    "com.microsoft",
    shapes=nbits_shapes,
    result=lambda dtypes, _: dtypes[0],
    arity=(3, 3),
    attributes={
        "K": (INT, True),
        "N": (INT, True),
        "block_size": (INT, True),
        "quant_type": (INT, True),
        "training_mode": (INT, False),
        "transB": (INT, False),
    },
)
def matmul_bnb4(attrs: Attrs, x: Array, weight: Array, magnitudes: Array) -> Any:
    w = four_bit_floats(weight, magnitudes, attrs)
    return (x.astype(np.float32) @ w.T).astype(x.dtype)
