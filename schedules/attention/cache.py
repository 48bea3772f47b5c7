"""How keys and values lie in the cache: float32 as they are, float16 or int8 rounded once."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.vector import LANES, Buffer, Expr

LARGEST_HALF = 65504.0
_SMALLEST_AMAX = 1e-30  # 127 / amax must not overflow


def store_key(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    position: Expr,
    source: Buffer,
    at: Expr,
) -> None:
    """Put the key at ``at`` of ``source`` into the cache."""
    d, blocks = shape.head_dim, shape.capacity // LANES
    # Converted by vectors first, since its elements go far apart.
    key = T.alloc_buffer((d,), shape.kv_dtype, scope="local")
    scale = _narrow_head(shape, source, at, key, T.int32(0))
    start = T.bind((head * blocks + position // LANES) * (d * LANES) + position % LANES)
    with T.serial(0, d) as i:
        vec.store(buffers["k_cache"], start + i * LANES, vec.load(key, i, 1), 1)
    if scale is not None:
        vec.store(buffers["k_scale"], head * shape.capacity + position, scale, 1)


def store_value(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    position: Expr,
    source: Buffer,
    at: Expr,
) -> None:
    """Put the value at ``at`` of ``source`` into the cache."""
    place = T.bind(head * shape.capacity + position)
    start = T.bind(place * shape.head_dim)
    scale = _narrow_head(shape, source, at, buffers["v_cache"], start)
    if scale is not None:
        vec.store(buffers["v_scale"], place, scale, 1)


def widen(shape: AttentionShape, stored: Expr) -> Expr:
    """Float32 of a scalar or vector of the cache, exactly; of int8, without its scale."""
    if shape.kv_dtype == "float32":
        return stored
    lanes = vec.lanes_of(stored)
    if shape.kv_dtype == "int8" or shape.native_f16:
        return T.bind(T.cast(stored, vec.dtype_of("float32", lanes)))
    return vec.half_to_float(T.reinterpret(vec.dtype_of("uint16", lanes), stored))


def _narrow_head(
    shape: AttentionShape, source: Buffer, at: Expr, target: Buffer, target_at: Expr
) -> Expr | None:
    """The head at ``at`` of ``source`` as the cache holds it, and its scale if it has one."""
    d = shape.head_dim
    scale = inverse = None
    if shape.kv_dtype == "int8":
        scale, inverse = _scale_of(source, at, d)
    for i, lanes in vec.pieces(d):
        value = vec.load(source, at + i, lanes)
        if inverse is not None:
            levels = vec.round_product_to_int(value, vec.splat(inverse, lanes))
            stored = T.cast(levels, vec.dtype_of("int8", lanes))
        else:
            stored = _narrow(shape, value)
        vec.store(target, target_at + i, stored, lanes)
    return scale


def _scale_of(source: Buffer, at: Expr, count: int) -> tuple[Expr, Expr]:
    """amax / 127 and 127 / amax; both 0 for what is all but zero."""
    largest = vec.Accumulators(1)

    def emit(i: Expr, lanes: int, _slot: int) -> None:
        magnitude = vec.float_of_bits(vec.magnitude(vec.load_part(source, at + i, lanes)))
        largest[0] = vec.highest(magnitude, largest[0])

    vec.sweep(count, emit)
    amax = vec.across(largest[0], vec.highest)
    zero, levels = T.float32(0.0), T.float32(127.0)
    tiny = amax < T.float32(_SMALLEST_AMAX)
    scale, inverse = (T.bind(T.Select(tiny, zero, x)) for x in (amax / levels, levels / amax))
    return scale, inverse


def _narrow(shape: AttentionShape, value: Expr) -> Expr:
    """A float32 vector as a cache of floats holds it.

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
