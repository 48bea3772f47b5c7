"""Portable vector arithmetic for kernels: 16 float32 lanes, whatever the registers of the ISA.

LLVM splits a 16-lane value into one AVX-512, two AVX2 or four NEON registers, or one RVV group of
four. Products that are summed go through ``fma``, never ``a * b + c``: LLVM may contract the latter
in one kernel and not in another, and a row's result must not depend on the kernel that computes it.
Values are bound (``T.bind``) as they are made, so an expression used twice is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

LANES = 16

# A TIR expression, a scalar or a vector; TVM's Python package carries no types.
Expr = Any
Buffer = Any

# 1.5 * 2**23: adding it to |x| < 2**22 rounds x to the nearest integer, ties to even, and leaves
# that integer in the low bits of the sum.
_ROUNDER = 12582912.0
_ROUNDER_BITS = 0x4B400000
# Below it exp is less than the smallest normal float32.
_EXP_UNDERFLOW = -87.33654
_EXP_OVERFLOW = 88.37
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4


def splat(value: float | Expr, lanes: int = LANES) -> Expr:
    """``value`` (a Python number becomes float32) in every lane."""
    if isinstance(value, (int, float)):
        value = T.float32(value)
    return value if lanes == 1 else T.broadcast(value, lanes)


def splat_int(value: int, lanes: int = LANES) -> Expr:
    """The int32 ``value`` in every lane."""
    return T.int32(value) if lanes == 1 else T.broadcast(T.int32(value), lanes)


def dtype_of(kind: str, lanes: int) -> str:
    """TIR's name of a vector type, or of the scalar type for one lane."""
    return kind if lanes == 1 else f"{kind}x{lanes}"


def lanes_of(value: Expr) -> int:
    """The number of lanes of an expression."""
    return int(value.ty.dtype.lanes)


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """``a * b + c``, rounded once; float32 scalars or vectors of one length."""
    dtype = dtype_of("float32", lanes_of(a))
    return T.bind(T.call_llvm_pure_intrin(dtype, "llvm.fma", a, b, c))


def load(buffer: Buffer, offset: Expr, lanes: int = LANES) -> Expr:
    """``lanes`` consecutive elements at ``offset``."""
    return T.bind(buffer[offset if lanes == 1 else T.ramp(offset, 1, lanes)])


def store(buffer: Buffer, offset: Expr, value: Expr, lanes: int = LANES) -> None:
    """Store ``lanes`` consecutive elements at ``offset``."""
    T.buffer_store(buffer, value, [offset if lanes == 1 else T.ramp(offset, 1, lanes)])


def take_lanes(value: Expr, first: int, count: int) -> Expr:
    """Lanes ``first .. first + count`` of a vector."""
    if first == 0 and count == lanes_of(value):
        return value
    return T.bind(tirx.Shuffle([value], list(range(first, first + count))))


def shuffle(values: Sequence[Expr], lanes: Sequence[int]) -> Expr:
    """The chosen lanes of the concatenation of ``values``."""
    return T.bind(tirx.Shuffle(list(values), list(lanes)))


def pieces(count: int) -> Iterator[tuple[int, int]]:
    """(offset, lanes) that cover ``count`` elements with vectors of 16, 8, 4, 2 and 1 lanes."""
    at = 0
    lanes = LANES
    while at < count:
        while lanes > count - at:
            lanes //= 2
        yield at, lanes
        at += lanes


def load_part(buffer: Buffer, offset: Expr, count: int) -> Expr:
    """16 lanes, the first ``count`` (1 to 16) from ``offset``, the others zero."""
    if count == LANES:
        return load(buffer, offset)
    scalars = [load(buffer, offset + i, 1) for i in range(count)]
    return shuffle([*scalars, *[T.float32(0.0)] * (LANES - count)], range(LANES))


def keep_part(value: Expr, count: int) -> Expr:
    """``value`` with lanes from ``count`` on set to zero."""
    if count == LANES:
        return value
    return shuffle([value, splat(0.0)], [i if i < count else LANES for i in range(LANES)])


def store_part(buffer: Buffer, offset: Expr, value: Expr, count: int) -> None:
    """Store the first ``count`` lanes."""
    for at, lanes in pieces(count):
        store(buffer, offset + at, take_lanes(value, at, lanes), lanes)


def store_zeros(buffer: Buffer, offset: Expr, count: int) -> None:
    """Make ``count`` consecutive float32 elements 0."""
    for at, lanes in pieces(count):
        store(buffer, offset + at, splat(0.0, lanes), lanes)


def sweep(count: int, emit: Callable[[Expr, int, int], None], unroll: int = 4) -> None:
    """Cover ``count`` elements: ``emit(offset, valid lanes, slot)`` for each vector of 16.

    ``slot`` is the vector's index modulo ``unroll``: the accumulator it belongs to.
    """
    vectors, tail = divmod(count, LANES)
    rounds = vectors // unroll
    if rounds > 1:
        with T.serial(0, rounds) as i:
            for slot in range(unroll):
                emit((i * unroll + slot) * LANES, LANES, slot)
    done = rounds * unroll if rounds > 1 else 0
    for index in range(done, vectors):
        emit(T.int32(index * LANES), LANES, index % unroll)
    if tail:
        emit(T.int32(vectors * LANES), tail, vectors % unroll)


class Accumulators:
    """``count`` vectors carried through a loop."""

    def __init__(self, count: int, initial: float = 0.0, lanes: int = LANES) -> None:
        self._lanes = lanes
        # One buffer for each: LLVM does not always keep parts of a larger one in registers.
        self._buffers = [T.alloc_buffer((lanes,), "float32", scope="local") for _ in range(count)]
        for index in range(count):
            self[index] = splat(initial, lanes)

    def __getitem__(self, index: int) -> Expr:
        return load(self._buffers[index], T.int32(0), self._lanes)

    def __setitem__(self, index: int, value: Expr) -> None:
        store(self._buffers[index], T.int32(0), value, self._lanes)

    def fold(self, combine: Callable[[Expr, Expr], Expr]) -> Expr:
        """All of them combined, neighbours first."""
        values = [self[i] for i in range(len(self._buffers))]
        while len(values) > 1:
            pairs = [
                T.bind(combine(a, b)) for a, b in zip(values[0::2], values[1::2], strict=False)
            ]
            values = pairs + values[2 * len(pairs) :]
        return values[0]


def across(value: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """The lanes of a vector combined into a scalar, lower half with upper half each time."""
    lanes = lanes_of(value)
    while lanes > 1:
        lanes //= 2
        value = T.bind(combine(take_lanes(value, 0, lanes), take_lanes(value, lanes, lanes)))
    return settled(value)


def settled(scalar: Expr) -> Expr:
    """The same scalar, by a variable that LLVM turns into a register.

    TVM's analyzer writes out what is bound wherever it is used, and simplifies that: where a long
    expression is used by long ones it takes most of the time of a compile. It looks into no buffer.
    """
    buffer = T.alloc_buffer((1,), str(scalar.ty.dtype), scope="local")
    store(buffer, T.int32(0), scalar, 1)
    return load(buffer, T.int32(0), 1)


class NotANumber:
    """Watches vectors for what is no number, ``count`` of them at once."""

    def __init__(self, count: int) -> None:
        self._largest = Accumulators(count)

    def look(self, x: Expr, slot: int) -> None:
        """Watch ``x``; ``slot`` is as ``sweep`` has it."""
        self._largest[slot] = highest(float_of_bits(magnitude(x)), self._largest[slot])

    def or_else(self, value: Expr) -> Expr:
        """The scalar ``value``, or no number where some lane was none."""
        largest = across(self._largest.fold(highest), highest)
        return T.bind(T.Select(largest == largest, value, largest))


def add(a: Expr, b: Expr) -> Expr:
    """``a + b``, to be passed to ``fold`` and ``across``."""
    return a + b


def maximum(a: Expr, b: Expr) -> Expr:
    """The larger, or ``b`` where either is not a number."""
    return T.max(a, b)


def minimum(a: Expr, b: Expr) -> Expr:
    """The smaller, or ``b`` where either is not a number."""
    return T.min(a, b)


def clamped(x: Expr, low: float | Expr, high: float | Expr) -> Expr:
    """``x`` within low and high; what is no number stays so. Bounds are scalars."""
    lanes = lanes_of(x)
    # Each bound comes first: see ``maximum``.
    return T.bind(maximum(splat(low, lanes), T.bind(minimum(splat(high, lanes), x))))


def magnitude(x: Expr) -> Expr:
    """The bits of ``|x|`` as int32: ordered as the magnitudes are, what is no number above all.

    So its ``maximum`` finds what is no number, which that of floats passes over.
    """
    lanes = lanes_of(x)
    bits = T.reinterpret(dtype_of("int32", lanes), x)
    return T.bind(T.bitwise_and(bits, splat_int(0x7FFFFFFF, lanes)))


def float_of_bits(bits: Expr) -> Expr:
    """The float32 that these bits, int32 or uint32, are."""
    return T.bind(T.reinterpret(dtype_of("float32", lanes_of(bits)), bits))


def highest(x: Expr, high: Expr) -> Expr:
    """The larger of ``x`` and ``high``, which is 0 or more; what is no number, of a positive sign,
    is above all."""
    kind = dtype_of("int32", lanes_of(x))
    return float_of_bits(T.bind(maximum(T.reinterpret(kind, x), T.reinterpret(kind, high))))


def lowest(x: Expr, low: Expr) -> Expr:
    """The smaller of ``x`` and ``low``, which is -0 or less; what is no number, of a negative sign,
    is below all."""
    kind = dtype_of("uint32", lanes_of(x))
    return float_of_bits(T.bind(maximum(T.reinterpret(kind, x), T.reinterpret(kind, low))))


def sum_int(value: Expr) -> Expr:
    """The sum of the lanes of an int32 vector (exact, so its order does not matter)."""
    return T.bind(T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", value))


def absolute(x: Expr) -> Expr:
    """``|x|``."""
    return T.bind(T.call_llvm_pure_intrin(dtype_of("float32", lanes_of(x)), "llvm.fabs", x))


def square_root(x: Expr) -> Expr:
    """The correctly rounded square root."""
    return T.bind(T.call_llvm_pure_intrin(dtype_of("float32", lanes_of(x)), "llvm.sqrt", x))


def round_to_int(x: Expr) -> Expr:
    """The nearest int32, ties to even, of |x| < 2**22; anything for larger or not a number."""
    return _integer_bits(T.bind(x + splat(_ROUNDER, lanes_of(x))))


def round_product_to_int(a: Expr, b: Expr) -> Expr:
    """The nearest int32 of the exact product ``a * b``, ties to even, where it is below 2**22."""
    return _integer_bits(fma(a, b, splat(_ROUNDER, lanes_of(a))))


def nearest(x: Expr) -> Expr:
    """``round_to_int`` as float32; what is no number stays so."""
    return _integral(T.bind(x + splat(_ROUNDER, lanes_of(x))))


def nearest_product(a: Expr, b: Expr) -> Expr:
    """``round_product_to_int`` as float32; what is no number stays so."""
    return _integral(fma(a, b, splat(_ROUNDER, lanes_of(a))))


def _integral(shifted: Expr) -> Expr:
    lanes = lanes_of(shifted)
    # An addition to LLVM; TVM's analyzer, which fails on differences of float vectors, skips it.
    return fma(shifted, splat(1.0, lanes), splat(-_ROUNDER, lanes))


def levels(x: Expr, scale: float | Expr, low: int | Expr, high: int | Expr) -> Expr:
    """``x / scale`` rounded half to even, within low and high: int32. No number becomes low.

    Each bound is known, as an integer, or a float32 scalar that holds one.
    """
    lanes = lanes_of(x)
    # A division, and bounds before rounding, as onnxruntime has it.
    ideal = T.bind(x / splat(scale, lanes))
    above = T.bind(maximum(ideal, splat(low, lanes)))
    return round_to_int(T.bind(minimum(above, splat(high, lanes))))


def rounded(x: Expr, scale: float | Expr, low: int | Expr, high: int | Expr) -> Expr:
    """``levels`` times the scale; what is no number stays so."""
    return T.bind(_float_levels(x, scale, low, high) * splat(scale, lanes_of(x)))


def rounded_onto(
    x: Expr, scale: float | Expr, low: int | Expr, high: int | Expr, addend: Expr
) -> Expr:
    """``rounded`` plus an addend of as many lanes."""
    return fma(_float_levels(x, scale, low, high), splat(scale, lanes_of(x)), addend)


def _float_levels(x: Expr, scale: float | Expr, low: int | Expr, high: int | Expr) -> Expr:
    """``levels`` as float32; what is no number stays so."""
    return nearest(clamped(T.bind(x / splat(scale, lanes_of(x))), low, high))


def _integer_bits(shifted: Expr) -> Expr:
    lanes = lanes_of(shifted)
    bits = T.reinterpret(dtype_of("int32", lanes), shifted)
    return T.bind(bits - splat_int(_ROUNDER_BITS, lanes))


def polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Horner's scheme, highest power first."""
    lanes = lanes_of(x)
    value = splat(coefficients[0], lanes)
    for coefficient in coefficients[1:]:
        value = fma(value, x, splat(coefficient, lanes))
    return value


def exp(x: Expr) -> Expr:
    """e**x to 2 ulp; 0 where the result would be subnormal, and about 2.4e38 from x = 88.37 on;
    what is no number stays so.

    Range reduction and coefficients are those of Cephes' expf.
    """
    lanes = lanes_of(x)
    within = clamped(x, _EXP_UNDERFLOW, _EXP_OVERFLOW)
    shifted = fma(within, splat(math.log2(math.e), lanes), splat(_ROUNDER, lanes))
    power = T.bind(shifted - splat(_ROUNDER, lanes))
    r = fma(power, splat(-_LN2_HIGH, lanes), within)
    r = fma(power, splat(-_LN2_LOW, lanes), r)
    p = polynomial(
        r,
        (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
         5.0000001201e-1),
    )  # fmt: skip
    value = T.bind(fma(p, T.bind(r * r), r) + splat(1.0, lanes))
    scaled = T.reinterpret(dtype_of("int32", lanes), value) + T.bind(
        T.shift_left(_integer_bits(shifted), splat_int(23, lanes))
    )
    result = T.bind(T.reinterpret(dtype_of("float32", lanes), scaled))
    return T.bind(T.Select(x < splat(_EXP_UNDERFLOW, lanes), splat(0.0, lanes), result))


def sigmoid(x: Expr) -> Expr:
    """``1 / (1 + exp(-x))``."""
    one = splat(1.0, lanes_of(x))
    return T.bind(one / (one + exp(T.bind(-x))))


def erf(x: Expr) -> Expr:
    """The error function to 4 ulp: the rational approximation of Eigen's erf."""
    x = clamped(x, -4.0, 4.0)
    square = T.bind(x * x)
    p = polynomial(
        square,
        (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
         -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
    )  # fmt: skip
    q = polynomial(
        square,
        (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03,
         -7.37332916720468e-03, -1.42647390514189e-02),
    )  # fmt: skip
    return T.bind(T.bind(x * p) / q)


def tanh(x: Expr) -> Expr:
    """The hyperbolic tangent to 4 ulp: the rational approximation of Eigen's tanh."""
    limit = 7.90531110763549805  # where it is 1 in float32
    x = clamped(x, -limit, limit)
    square = T.bind(x * x)
    p = polynomial(
        square,
        (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
         1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
    )  # fmt: skip
    q = polynomial(
        square, (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03,
                 4.89352518554385e-03),
    )  # fmt: skip
    return T.bind(T.bind(x * p) / q)


def half_to_float(bits: Expr) -> Expr:
    """IEEE half-precision bits (uint16) of finite values as float32, exactly.

    Done on integers, since RVV without Zvfhmin would call a library function for each element. An
    infinity or what is no number becomes a number of magnitude 65536 or more.
    """
    lanes = lanes_of(bits)
    signed = T.cast(T.reinterpret(dtype_of("int16", lanes), bits), dtype_of("int32", lanes))
    shifted = T.shift_left(T.bind(signed), splat_int(13, lanes))
    # Without the copies of the sign, the exponent is still biased for half precision; the product
    # also makes subnormals normal.
    placed = T.bind(T.bitwise_and(shifted, splat_int(-0x70002000, lanes)))
    return T.bind(T.reinterpret(dtype_of("float32", lanes), placed) * splat(2.0**112, lanes))


def float_to_half(x: Expr) -> Expr:
    """IEEE half-precision bits (uint16) of float32 up to 65504, to nearest, ties to even.

    What is no number stays so. Done on integers, for ISAs without an instruction.
    """
    lanes = lanes_of(x)
    bits = T.bind(T.reinterpret(dtype_of("int32", lanes), x))
    magnitude = T.bind(T.bitwise_and(bits, splat_int(0x7FFFFFFF, lanes)))
    odd = T.bitwise_and(T.shift_right(magnitude, splat_int(13, lanes)), splat_int(1, lanes))
    # Exponent biased by 15 in the place of 127; just under a half is added, and the last bit kept.
    rebias = splat_int(((15 - 127) << 23) + 0xFFF, lanes)
    normal = T.shift_right(T.bind(magnitude + T.bind(rebias + odd)), splat_int(13, lanes))
    # A sum with 0.5 is rounded to multiples of 2**-24, the unit of subnormal halves.
    sum_bits = T.reinterpret(dtype_of("int32", lanes), T.bind(absolute(x) + splat(0.5, lanes)))
    subnormal = sum_bits - splat_int(0x3F000000, lanes)
    is_subnormal = magnitude < splat_int((127 - 14) << 23, lanes)
    value = T.bind(T.Select(is_subnormal, subnormal, normal))
    no_number = magnitude > splat_int(0x7F800000, lanes)
    value = T.bind(T.Select(no_number, splat_int(0x7E00, lanes), value))
    sign = T.bitwise_and(T.shift_right(bits, splat_int(16, lanes)), splat_int(0x8000, lanes))
    return T.bind(T.cast(T.bitwise_or(value, sign), dtype_of("uint16", lanes)))
