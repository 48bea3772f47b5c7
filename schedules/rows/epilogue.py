"""How each epilogue stores the values of a row. Results do not depend on the prologue's kind."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.rows.op import RowOp
from slmtvm.schedules.rows.prologue import Buffers, Value, number_of, vectors_at_once
from slmtvm.schedules.vector import LANES, Accumulators, Buffer, Expr

_SMALLEST_AMAX = 1e-30  # 127 / amax must not overflow


def _f32(op: RowOp, row: Expr, buffers: Buffers, value: Value) -> None:
    def emit(column: Expr, count: int, _slot: int) -> None:
        vec.store_part(buffers["y"], row * op.d + column, value(column, count), count)

    vec.sweep(op.d, emit, vectors_at_once(op))


def _block(op: RowOp, row: Expr, buffers: Buffers, value: Value) -> None:
    full, rest = divmod(op.d, op.group_size)
    if full:
        with T.serial(0, full) as block:
            quantize_block(op, row, block, op.group_size, buffers, value)
    if rest:
        quantize_block(op, row, T.int32(full), rest, buffers, value)


def quantize_block(
    op: RowOp, row: Expr, block: Expr, count: int, buffers: Buffers, value: Value
) -> None:
    """The epilogue "block" of the ``count`` values that block ``block`` of a row has."""
    values = []
    for at in range(0, count, LANES):
        here = min(LANES, count - at)
        column = block * op.group_size + at
        values.append(value(column, here))
        if op.keep_f32:
            vec.store_part(buffers["y"], row * op.d + column, values[-1], here)
    largest = vec.magnitude(values[0])
    for v in values[1:]:
        largest = T.bind(vec.maximum(vec.magnitude(v), largest))
    amax = vec.float_of_bits(vec.across(largest, vec.maximum))
    zero, full_scale = T.float32(0.0), T.float32(127.0)
    tiny = amax < T.float32(_SMALLEST_AMAX)
    inverse = vec.splat(T.bind(T.Select(tiny, zero, full_scale / amax)))
    total = None
    for at in range(0, op.group_size, LANES):
        index = at // LANES
        # Blocks are padded with zeros, which quantize to zero.
        if index < len(values):
            # The product is rounded first, as onnxruntime has it: half of amax lies half-way
            # between two levels. The minimum keeps product and sum from becoming one operation.
            ideal = T.bind(vec.minimum(T.bind(values[index] * inverse), vec.splat(128.0)))
            q = vec.round_to_int(ideal)
            total = q if total is None else T.bind(total + q)
        else:
            q = vec.splat_int(0)
        offset = row * op.k_padded + block * op.group_size + at
        vec.store(buffers["xq"], offset, T.cast(q, f"int8x{LANES}"))
    at = row * op.blocks + block
    vec.store(buffers["xs"], at, T.Select(tiny, zero, amax / full_scale), 1)
    vec.store(buffers["xsum"], at, T.cast(vec.sum_int(total), "float32"), 1)


def _row_u8(op: RowOp, row: Expr, buffers: Buffers, value: Value) -> None:
    if op.needs_scratch:
        kept, start = buffers["scratch"], T.int32(0)
    else:
        kept, start = buffers["y" if op.keep_f32 else "x"], row * op.d
    copies = op.prologue != "copy" or op.keep_f32
    lowest, highest = _find_range(op, value, kept if copies else None, start)
    quantize_row_u8(
        kept, start, op.d, lowest, highest, buffers, row, op.k_padded, op.storage
    )  # fmt: skip


def _rounding(op: RowOp, buffers: Buffers) -> tuple[Expr, Expr, Expr]:
    """Scale, low and high of a static epilogue, float32 scalars."""
    scale, low, high = (number_of(op, buffers, name) for name in ("scale", "low", "high"))
    return scale, low, high


def _rounded(op: RowOp, row: Expr, buffers: Buffers, value: Value) -> None:
    rounding = _rounding(op, buffers)

    def emit(column: Expr, count: int, _slot: int) -> None:
        y = vec.rounded(value(column, count), *rounding)
        vec.store_part(buffers["y"], row * op.d + column, y, count)

    vec.sweep(op.d, emit, vectors_at_once(op))


def _static_u8(op: RowOp, row: Expr, buffers: Buffers, value: Value) -> None:
    scale, low, high = _rounding(op, buffers)
    least = T.bind(T.cast(low, "int32"))
    vec.store(buffers["xz"], row, T.bind(-least), 1)
    watch = vec.NotANumber(vectors_at_once(op))
    bias = vec.splat(T.bind(least + (128 if op.storage == "int8" else 0)))

    def emit(column: Expr, count: int, slot: int) -> None:
        v = value(column, count)
        watch.look(v, slot)
        q = vec.levels(v, scale, low, high)
        if op.keep_f32:
            y = T.bind(T.cast(q, f"float32x{LANES}") * vec.splat(scale))
            vec.store_part(buffers["y"], row * op.d + column, y, count)
        stored = T.cast(T.bind(q - bias), f"{op.storage}x{LANES}")
        vec.store(buffers["xq"], row * op.k_padded + column, stored)

    vec.sweep(op.d, emit, vectors_at_once(op))
    # A row that holds what is no number has that for its scale.
    vec.store(buffers["xs"], row, watch.or_else(scale), 1)
    padding = T.bind(vec.splat_int(0) - bias)
    for column in range(-(-op.d // LANES) * LANES, op.k_padded, LANES):
        stored = T.cast(padding, f"{op.storage}x{LANES}")
        vec.store(buffers["xq"], row * op.k_padded + column, stored)


def _range(op: RowOp, row: Expr, buffers: Buffers, value: Value) -> None:
    lowest, highest = _find_range(op, value, buffers["y"], row * op.d)
    vec.store(buffers["low"], row, lowest, 1)
    vec.store(buffers["high"], row, highest, 1)


def _find_range(op: RowOp, value: Value, kept: Buffer | None, start: Expr) -> tuple[Expr, Expr]:
    """The least and the greatest value of a row, 0 among them; copies the row to ``kept``.

    One of them is no number where some value is none.
    """
    chains = vectors_at_once(op)
    # From 0, since the range includes it.
    low, high = Accumulators(chains, initial=-0.0), Accumulators(chains)

    def find(column: Expr, count: int, slot: int) -> None:
        v = value(column, count)
        if kept is not None:
            vec.store_part(kept, start + column, v, count)
        low[slot] = vec.lowest(v, low[slot])
        high[slot] = vec.highest(v, high[slot])

    vec.sweep(op.d, find, chains)
    lowest = vec.across(low.fold(vec.lowest), vec.lowest)
    return lowest, vec.across(high.fold(vec.highest), vec.highest)


def quantize_row_u8(
    source: Buffer,
    start: Expr,
    d: int,
    lowest: Expr,
    highest: Expr,
    buffers: Buffers,
    row: Expr,
    k_padded: int,
    storage: str,
) -> None:
    """ONNX DynamicQuantizeLinear for a range, on the d values at ``start`` -> xq, xs and xz.

    The scale is no number where a bound of the range is none.
    """
    scale = T.bind(
        T.Select(
            highest <= lowest,
            T.float32(1.0),
            T.bind(highest - lowest) / T.float32(255.0),
        )
    )
    ideal = T.bind(T.bind(T.float32(0.0) - lowest) / scale)
    bounded = T.bind(vec.minimum(vec.maximum(ideal, T.float32(0.0)), T.float32(255.0)))
    zero_point = vec.round_to_int(bounded)
    vec.store(buffers["xs"], row, scale, 1)
    vec.store(buffers["xz"], row, zero_point, 1)
    scales, zeros = vec.splat(scale), vec.splat(zero_point)
    least = vec.splat(T.bind(T.cast(T.int32(0) - zero_point, "float32")))
    most = vec.splat(T.bind(T.cast(T.int32(255) - zero_point, "float32")))
    bias = vec.splat_int(128 if storage == "int8" else 0)

    def quantize(column: Expr, v: Expr | None) -> None:
        q = zeros
        if v is not None:
            # A division, as onnxruntime has it: a product with the reciprocal rounds otherwise.
            ideal = T.bind(vec.maximum(T.bind(v / scales), least))  # what is no number is the least
            q = T.bind(vec.round_to_int(T.bind(vec.minimum(ideal, most))) + zeros)
        stored = T.cast(T.bind(q - bias), f"{storage}x{LANES}")
        vec.store(buffers["xq"], row * k_padded + column, stored)

    vec.sweep(d, lambda at, count, _: quantize(at, vec.load_part(source, start + at, count)))
    for column in range(-(-d // LANES) * LANES, k_padded, LANES):
        quantize(T.int32(column), None)


EPILOGUE_CODE: dict[str, Callable[[RowOp, Expr, Buffers, Value], None]] = {
    "f32": _f32,
    "block": _block,
    "row_u8": _row_u8,
    "range": _range,
    "rounded": _rounded,
    "static_u8": _static_u8,
}
