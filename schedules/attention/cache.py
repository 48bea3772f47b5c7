"""How a key or value is stored in the cache: float32 as it is, float16 rounded once."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.vector import Expr

LARGEST_HALF = 65504.0


def narrow(shape: AttentionShape, value: Expr) -> Expr:
    """A float32 scalar or vector as the cache stores it.

    To float16, to nearest with ties to even; beyond its range the largest finite float16, so that a
    single outlier cannot turn a row into infinities and then into no numbers.
    """
    if shape.kv_dtype == "float32":
        return value
    lanes = vec.lanes_of(value)
    # The limits come first: what is no number stays so.
    below = T.bind(vec.minimum(vec.splat(LARGEST_HALF, lanes), value))
    bounded = T.bind(vec.maximum(vec.splat(-LARGEST_HALF, lanes), below))
    half = vec.dtype_of("float16", lanes)
    if shape.native_f16:
        return T.bind(T.cast(bounded, half))
    return T.reinterpret(half, vec.float_to_half(bounded))


def widen(shape: AttentionShape, stored: Expr) -> Expr:
    """Float32 of a scalar or vector of the cache, exactly."""
    if shape.kv_dtype == "float32":
        return stored
    lanes = vec.lanes_of(stored)
    if shape.native_f16:
        return T.bind(T.cast(stored, vec.dtype_of("float32", lanes)))
    return vec.half_to_float(T.reinterpret(vec.dtype_of("uint16", lanes), stored))
