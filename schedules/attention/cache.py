"""How keys and values lie in the cache: float32 as they are, float16, int8 or int4 rounded once."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.vector import LANES, Buffer, Expr

LARGEST_HALF = 65504.0
_SMALLEST_AMAX = 1e-30  # 127 / amax must not overflow
_BYTE_MOST = 127.0  # levels of int8, each way
_NIBBLE_ZERO = 8  # added to levels of int4, which are -8 to 7


def store_key(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    position: Expr,
    source: Buffer,
    at: Expr,
) -> None:
    """Put the key at ``at`` of ``source`` into the cache."""
    blocks, width = shape.kept // LANES, row_width(shape)
    position = slot_of(shape, position)
    # Converted by vectors first, since its elements go far apart.
    key = T.alloc_buffer((width,), shape.stored_dtype, scope="local")
    groups = shape.scale_groups
    start = T.bind((head * blocks + position // LANES) * (width * LANES) + position % LANES)

    def scale_at(group: int) -> Expr:
        return T.bind((head * groups + group) * shape.kept + position)

    _narrow_head(shape, source, at, key, T.int32(0), "k", buffers, scale_at)
    with T.serial(0, width) as i:
        vec.store(buffers["k_cache"], start + i * LANES, vec.load(key, i, 1), 1)


def store_value(
    shape: AttentionShape,
    buffers: dict[str, Buffer],
    head: Expr,
    position: Expr,
    source: Buffer,
    at: Expr,
) -> None:
    """Put the value at ``at`` of ``source`` into the cache."""
    place = T.bind(head * shape.kept + slot_of(shape, position))
    start, groups = T.bind(place * row_width(shape)), shape.scale_groups
    _narrow_head(
        shape, source, at, buffers["v_cache"], start, "v", buffers,
        lambda group: T.bind(place * groups + group),
    )  # fmt: skip


def row_width(shape: AttentionShape) -> int:
    """Elements of the cache's tensors that hold a key or value."""
    return shape.head_dim // 2 if shape.kv_dtype == "int4" else shape.head_dim


def slot_of(shape: AttentionShape, position: Expr) -> Expr:
    """Where the cache, and memory for scores, have ``position``."""
    return T.bind(position % shape.ring) if shape.ring else position


def block_slot(shape: AttentionShape, block: Expr) -> Expr:
    """Which block of 16 positions there holds the block ``block`` of all positions."""
    return T.bind(block % (shape.ring // LANES)) if shape.ring else block


def slot_after(shape: AttentionShape, begin: Expr) -> Callable[[Expr], Expr]:
    """``slot_of`` for positions from ``begin`` on, a ring's length of them, without a division."""
    if not shape.ring:
        return lambda position: position
    ring = T.int32(shape.ring)
    origin = T.bind(begin // shape.ring * shape.ring)

    def slot(position: Expr) -> Expr:
        place = T.bind(position - origin)
        return T.bind(T.Select(place < ring, place, place - ring))

    return slot


def load_key_pair(keys: Buffer, at: Expr) -> tuple[Expr, Expr]:
    """Two features of an int4 cache's 16 keys, as float32 without their scales."""
    both = T.bind(T.cast(vec.load(keys, at), f"int32x{LANES}"))
    return _from_nibbles(T.bind(T.bitwise_and(both, vec.splat_int(15)))), _from_nibbles(
        T.bind(T.shift_right(both, vec.splat_int(4)))
    )


def load_value(shape: AttentionShape, values: Buffer, row: Expr, at: Expr, lanes: int) -> Expr:
    """Features ``at .. at + lanes``, a piece of a head, of the value in the row that begins at
    ``row``, as float32; of integers without its scale."""
    if shape.kv_dtype != "int4":
        return widen(shape, vec.load(values, row + at, lanes))
    half = lanes // 2
    both = T.bind(T.cast(vec.load(values, row + at // 2, half), vec.dtype_of("int32", half)))
    low = T.bind(T.bitwise_and(both, vec.splat_int(15, half)))
    high = T.bind(T.shift_right(both, vec.splat_int(4, half)))
    return _from_nibbles(vec.shuffle([low, high], range(lanes)))


def _from_nibbles(nibbles: Expr) -> Expr:
    lanes = vec.lanes_of(nibbles)
    signed = T.bind(nibbles - vec.splat_int(_NIBBLE_ZERO, lanes))
    return T.bind(T.cast(signed, vec.dtype_of("float32", lanes)))


def widen(shape: AttentionShape, stored: Expr) -> Expr:
    """Float32 of a scalar or vector of the cache, exactly; of int8, without its scale."""
    if shape.kv_dtype == "float32":
        return stored
    lanes = vec.lanes_of(stored)
    if shape.kv_dtype == "int8" or shape.native_f16:
        return T.bind(T.cast(stored, vec.dtype_of("float32", lanes)))
    return vec.half_to_float(T.reinterpret(vec.dtype_of("uint16", lanes), stored))


def _narrow_head(
    shape: AttentionShape,
    source: Buffer,
    at: Expr,
    target: Buffer,
    target_at: Expr,
    kind: str,
    buffers: dict[str, Buffer],
    scale_at: Callable[[int], Expr],
) -> None:
    """The head at ``at`` of ``source`` as the cache holds it, to ``target``; the scales of its
    groups, where it has any, to ``scale_at`` each."""
    if not shape.scale_groups:
        for i, lanes in vec.pieces(shape.head_dim):
            value = vec.load(source, at + i, lanes)
            vec.store(target, target_at + i, _narrow(shape, value), lanes)
        return
    size = shape.scale_group
    for group in range(shape.scale_groups):
        first = group * size
        nibbles = shape.kv_dtype == "int4"
        scale, inverse = _scale_of(source, at + first, size, nibbles=nibbles)
        for i, lanes in vec.pieces(size):
            value = vec.load(source, at + (first + i), lanes)
            levels = vec.round_product_to_int(value, vec.splat(inverse, lanes))
            if not nibbles:
                stored = T.cast(levels, vec.dtype_of("int8", lanes))
                vec.store(target, target_at + (first + i), stored, lanes)
                continue
            packed = _pack(T.bind(levels), neighbours=kind == "k")
            vec.store(target, target_at + (first + i) // 2, packed, lanes // 2)
        vec.store(buffers[f"{kind}_scale"], scale_at(group), scale, 1)


def _pack(levels: Expr, *, neighbours: bool) -> Expr:
    """Pairs of levels in bytes: neighbours, or the first half and the second."""
    lanes = vec.lanes_of(levels)
    half = lanes // 2
    # What is no number may be any level, and nothing else is below -8.
    above = T.bind(T.max(levels, vec.splat_int(-_NIBBLE_ZERO, lanes)))
    within = T.bind(T.min(above, vec.splat_int(_NIBBLE_ZERO - 1, lanes)))
    nibbles = T.bind(within + vec.splat_int(_NIBBLE_ZERO, lanes))
    firsts = range(0, lanes, 2) if neighbours else range(half)
    seconds = range(1, lanes, 2) if neighbours else range(half, lanes)
    low, high = vec.shuffle([nibbles], firsts), vec.shuffle([nibbles], seconds)
    both = T.bitwise_or(low, T.bind(T.shift_left(high, vec.splat_int(4, half))))
    return T.bind(T.cast(T.bind(both), vec.dtype_of("uint8", half)))


def _scale_of(source: Buffer, at: Expr, count: int, *, nibbles: bool) -> tuple[Expr, Expr]:
    """What the levels of ``count`` features stand for, and the inverse; both 0 for what is all but
    zero.

    The scale of int8 is amax / 127. That of int4 is such that the element with the largest
    magnitude is level -8, which needs none of the levels beyond the other ones.
    """
    largest = vec.Accumulators(1)
    ends = vec.Accumulators(2) if nibbles else None

    def emit(i: Expr, lanes: int, _slot: int) -> None:
        value = vec.load_part(source, at + i, lanes)
        magnitude = vec.float_of_bits(vec.magnitude(value))
        largest[0] = vec.highest(magnitude, largest[0])
        if ends is not None:
            ends[0] = T.bind(vec.maximum(value, ends[0]))
            ends[1] = T.bind(vec.minimum(value, ends[1]))

    vec.sweep(count, emit)
    amax = vec.across(largest[0], vec.highest)
    zero, levels = T.float32(0.0), T.float32(_BYTE_MOST)
    tiny = amax < T.float32(_SMALLEST_AMAX)
    if ends is not None:
        high, low = vec.across(ends[0], vec.maximum), vec.across(ends[1], vec.minimum)
        levels = T.bind(
            T.Select(high + low > zero, T.float32(-_NIBBLE_ZERO), T.float32(_NIBBLE_ZERO))
        )
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
