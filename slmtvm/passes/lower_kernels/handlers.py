"""One function for each fused op: which kernels compute it, on which operands."""

from slmtvm.passes.lower_kernels import (
    attention,
    convolution,
    cross_attention,
    elementwise,
    embedding,
    experts,
    head_linear,
    linear,
    pool,
    positions,
    rows,
)
from slmtvm.passes.lower_kernels.registry import BY_SESSION, HANDLERS

__all__ = [
    "BY_SESSION",
    "HANDLERS",
    "attention",
    "convolution",
    "cross_attention",
    "elementwise",
    "embedding",
    "experts",
    "head_linear",
    "linear",
    "pool",
    "positions",
    "rows",
]
