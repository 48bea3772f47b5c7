"""AVX2 with FMA and F16C: byte products in pairs of int16, which saturate unless kept small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa._picking import (
    PAIR_CHOICES,
    ListCost,
    PairPicking,
    Picking,
    TurnedPairs,
    Window,
)
from slmtvm.schedules.isa._x86 import (
    BroadcastRow,
    BytePairPicking,
    broadcast_word,
    fields,
    twice,
)
from slmtvm.schedules.isa.base import (
    Buffer,
    Dot,
    Expr,
    Isa,
    Row,
    RowsDot,
    Vectors,
    intrinsic,
    let,
    load,
    splat,
)

LANES = 8
PAIRS = "int16x16"


def _sum_pairs(pairs: Expr, factors: Expr | None = None) -> Expr:
    """int32 sums of neighbouring int16 products: vpmaddwd."""
    ones = splat(1, "int16", 2 * LANES) if factors is None else factors
    return intrinsic("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, ones)


def _multiply_bytes(unsigned: Expr, signed: Expr) -> Expr:
    """Sums of two neighbouring products as int16, saturated: vpmaddubsw."""
    return intrinsic(PAIRS, "llvm.x86.avx2.pmadd.ub.sw", unsigned, signed)


class _ByteActivations(BroadcastRow, Dot):
    def activation(self, row: Row, k: int) -> Expr:
        buffer, at = row
        return let(T.reinterpret("int8x32", broadcast_word(buffer, at + k, LANES)))


class _FieldsS8(_ByteActivations):
    """A step adds 2 * 15 * 127 at most to an int16, and a fifth of that for 2 bits: 8 and 40 steps
    cannot overflow."""

    state = (PAIRS,)
    unpacked = "uint8x32"

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self.max_steps = {4: 8, 2: 40}[bits]

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        return fields(raw, self._bits, "uint8x32", LANES)

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        pairs = _multiply_bytes(weight, activation)
        return (pairs if state is None else let(state[0] + pairs),)

    def finish(self, state: Vectors) -> Expr:
        return _sum_pairs(state[0])


class _S8S8(_ByteActivations):
    """``|w| * (a with the sign of w)``: two products are 2 * 128 * 127 at most: no overflow.

    A weight operand is the pair (|w|, w).
    """

    state = ("int32x8",)

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        signed = let(raw)
        magnitude = let(T.max(signed, splat(0, "int8", 4 * LANES) - signed))
        return ((let(T.reinterpret("uint8x32", magnitude)), signed),)

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        magnitude, signed = weight
        with_sign = intrinsic("int8x32", "llvm.x86.avx2.psign.b", activation, signed)
        quads = _sum_pairs(_multiply_bytes(magnitude, with_sign))
        return (quads if state is None else let(state[0] + quads),)


class _S8Row(BroadcastRow, Dot):
    """Bytes at even and at odd k are widened to int16 apart: products of 255 * 128 never saturate.

    An operand, of weights or activations, is the pair (even, odd).
    """

    state = ("int32x8",)

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        eight = splat(8, "int16", 2 * LANES)
        both = let(T.reinterpret(PAIRS, raw))
        even = let(T.shift_right(T.shift_left(both, eight), eight))
        return ((even, let(T.shift_right(both, eight))),)

    def activation(self, row: Row, k: int) -> Expr:
        buffer, at = row
        both = let(T.reinterpret("uint16x16", broadcast_word(buffer, at + k, LANES)))
        even = T.bitwise_and(both, splat(0xFF, "uint16", 2 * LANES))
        odd = T.shift_right(both, splat(8, "uint16", 2 * LANES))
        return let(T.reinterpret(PAIRS, even)), let(T.reinterpret(PAIRS, odd))

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        even, odd = (_sum_pairs(w, a) for w, a in zip(weight, activation, strict=True))
        return (let(even + odd) if state is None else let(let(state[0] + even) + odd),)

    def ones(self) -> Expr:
        one = splat(1, "int16", 2 * LANES)
        return (one, one)


def _magnitude_and_sign(raw: Expr) -> tuple[Expr, Expr]:
    signed = let(raw)
    magnitude = T.max(signed, splat(0, "int8", 4 * LANES) - signed)
    sign = T.shift_right(signed, splat(7, "int8", 4 * LANES))
    return let(T.reinterpret("uint8x32", magnitude)), let(sign)


def _flipped_products(weight: tuple[Expr, Expr], signed: Expr) -> Expr:
    """int32 sums of the magnitudes times activations q - 128, flipped where the sign says so."""
    magnitude, sign = weight
    return _sum_pairs(_multiply_bytes(magnitude, let(T.bitwise_xor(signed, sign))))


def _lost_by_flips(weights: np.ndarray) -> np.ndarray:
    """What sums of ``_flipped_products`` lack of those of weights (n, k) and q: (n,) int32."""
    wide = weights.astype(np.int32)
    lost: np.ndarray = (128 * wide - np.minimum(wide, 0)).sum(axis=1, dtype=np.int32)
    return lost


class _Picking(Picking):
    """Signed activations x = q - 128, of which a weight below 0 picks ``~x = -1 - x`` instead.

    A product with the magnitude then lacks just the magnitude; -128 has no negative in a byte, but
    has this. Two products are 2 * 128 * -128 at least: no overflow.
    """

    state = ("int32x8",)

    def missing(self, weights: np.ndarray) -> np.ndarray | None:
        return _lost_by_flips(weights)

    def places(self, raw: Expr) -> tuple[Expr, Expr]:
        low, high = fields(raw, 4, "int8x32", LANES)
        return low, high


class _PickingSigned(_Picking):
    """8 activations are followed by their complements, so that a place of 4 bits has the sign."""

    signs = True

    def row(self, buffer: Buffer, at: Expr) -> Expr:
        eight = T.Broadcast(T.reinterpret("int64", load(buffer, at, 8)), 4)
        flips = [T.IntImm("int64", flip) for flip in (-0x7F7F7F7F7F7F7F80, 0x7F7F7F7F7F7F7F7F)]
        return let(
            T.reinterpret("int8x32", T.bitwise_xor(eight, T.Shuffle(flips * 2, [0, 1, 2, 3])))
        )

    def weights(self, raw: Expr) -> Expr:
        return let(T.reinterpret("uint8x32", raw))

    def step(self, state: Vectors, weight: Expr, places: Expr, row: Expr) -> Vectors:
        picked = intrinsic("int8x32", "llvm.x86.avx2.pshuf.b", row, places)
        return (let(state[0] + _sum_pairs(_multiply_bytes(weight, picked))),)


class _PickingPlain(_Picking):
    """16 activations; what is picked is flipped where the weight is below 0. A weight operand is
    the pair of its magnitude and its sign, in all bits."""

    def row(self, buffer: Buffer, at: Expr) -> Expr:
        sixteen = twice(load(buffer, at, 16))
        words = T.bitwise_xor(T.reinterpret("int32x8", sixteen), splat(-0x7F7F7F80, "int32", LANES))
        return let(T.reinterpret("int8x32", words))

    def weights(self, raw: Expr) -> Expr:
        return _magnitude_and_sign(raw)

    def step(self, state: Vectors, weight: Expr, places: Expr, row: Expr) -> Vectors:
        picked = intrinsic("int8x32", "llvm.x86.avx2.pshuf.b", row, places)
        return (let(state[0] + _flipped_products(weight, picked)),)


class _RowsDot(RowsDot):
    """Signed activations, flipped where a weight is below 0, as ``_Picking`` has them. A weight
    operand is the pair of its magnitude and its sign, in all bits."""

    def __init__(self) -> None:
        super().__init__(_S8Row(), LANES, "int8")

    def turned(self, words: Expr) -> Expr:
        return T.bitwise_xor(words, splat(-0x7F7F7F80, "int32", LANES))

    def missing(self, weights: np.ndarray) -> np.ndarray | None:
        return _lost_by_flips(weights)

    def weight(self, buffer: Buffer, at: Expr) -> Expr:
        return _magnitude_and_sign(super().weight(buffer, at))

    def step(self, state: Vectors, weight: Expr, rows: Expr) -> Vectors:
        return (let(state[0] + _flipped_products(weight, rows)),)

    def finish(self, state: Vectors) -> Expr:
        return state[0]


class _Pairs(BytePairPicking):
    """A step adds 2 * 8 * 255 at most to an int16: 8 steps cannot overflow."""

    state = (PAIRS,)
    max_steps = 8

    def multiply(self, state: Vectors | None, weight: Expr, picked: Expr) -> Vectors:
        pairs = _multiply_bytes(picked, weight)
        return (pairs if state is None else let(state[0] + pairs),)

    def finish(self, state: Vectors) -> Expr:
        return _sum_pairs(state[0])


class _TurnedPairs(TurnedPairs):
    """16 rows, activations 128 more than they are, in the order of lanes that ``finish`` wants."""

    rows = 2 * LANES

    def choices(self, words: Sequence[Expr]) -> list[Expr]:
        flip = splat(-0x7F7F7F80, "int32", LANES)
        halves = [let(T.reinterpret("uint8x32", T.bitwise_xor(half, flip))) for half in words]
        found = []
        for pair in PAIR_CHOICES:
            order = [
                32 * half + 16 * part + 4 * row + k
                for part in range(2)
                for half in range(2)
                for row in range(4)
                for k in pair
            ]
            found.append(let(T.reinterpret(PAIRS, T.Shuffle(halves, order))))
        return found

    def places(self, raw: Expr) -> list[Expr]:
        words = let(T.reinterpret("int32x8", raw))
        # By the first place and four times the second; what no weights have is the first choice.
        table = [0] * 16
        for choice, (first, second) in enumerate(PAIR_CHOICES):
            table[first + 4 * second] = choice
        choices = T.Shuffle([T.IntImm("int8", c) for c in table * 2], [*range(32)])
        factors = T.Shuffle([T.IntImm("int8", f) for f in (1, 4) * 16], [*range(32)])
        found = []
        for shift in range(0, 8, 2):
            moved = T.shift_right(words, splat(shift, "int32", LANES)) if shift else words
            two = let(T.bitwise_and(moved, splat(0x03030303, "int32", LANES)))
            index = _multiply_bytes(T.reinterpret("uint8x32", two), factors)
            made = intrinsic(
                "int8x32", "llvm.x86.avx2.pshuf.b", choices, T.reinterpret("int8x32", index)
            )
            found.append(let(T.reinterpret("uint16x16", made)))
        return found

    def start(self, sums: Expr) -> Expr:
        """Less 128 of each weight, and 2**15 more, for ``finish``."""
        less = T.shift_left(sums, splat(7, "int16", LANES))
        return let(splat(-(2**15), "int16", LANES) - less)

    def step(self, state: Expr, weights: Expr, pairs: Expr) -> Expr:
        unsigned = T.reinterpret("uint8x32", pairs)
        return let(state + _multiply_bytes(unsigned, T.reinterpret("int8x32", weights)))

    def finish(self, state: Expr) -> list[Expr]:
        """As the last 16 bits of floats from 2**23 on, of which that and 2**15 are taken off; the
        halves are dealt to them within 128 bits."""
        exponents = splat(0x4B00, "int16", 2 * LANES)
        found = []
        for first in (0, 4):
            order = [
                8 * part + first + lane + 16 * which
                for part in range(2)
                for lane in range(4)
                for which in range(2)
            ]
            both = T.Shuffle([state, exponents], order)
            floats = T.reinterpret("float32x8", let(both))
            found.append(let(floats - splat(float(2**23 + 2**15), "float32", LANES)))
        return found


class Avx2(Isa):
    register = "x"
    sets_apart = True
    pairs_groups = True  # measured: 1.03 times the demo model's prefill

    # Measured by scripts/bench_sparse.py.
    list_cost = ListCost(step=1.2, ends=25)
    list_cost_of_rows = ListCost(step=1.05, ends=10)
    window_times: ClassVar[Mapping[str, tuple[float, float]]] = {
        "4of8": (0.62, 0.5),
        "4of16": (0.42, 0.35),
    }
    listed_rows = ListCost(step=1.75, ends=15)
    listed_blocks = ListCost(step=0.85, ends=5)
    listed_weights = ListCost(step=1.0, ends=15)
    pair_times = (0.83, 0.87)  # one row from cache: 1
    turned_pair_time = 0.82

    def fields_s8(self, bits: int, rows: int) -> Dot:
        return _FieldsS8(bits)

    def s8_s8(self) -> Dot:
        return _S8S8()

    def s8_row(self) -> Dot:
        return _S8Row()

    def picking(self, window: Window) -> Picking:
        return _PickingSigned() if window.size == 8 else _PickingPlain()

    def pair_picking(self) -> PairPicking:
        return _Pairs()

    def turned_pairs(self) -> TurnedPairs:
        return _TurnedPairs()

    def rows_dot(self) -> RowsDot:
        return _RowsDot()

    def multiply_bytes(self, unsigned: Expr, signed: Expr) -> Expr:
        return _multiply_bytes(unsigned, signed)


ISA = Avx2("avx2", lanes=LANES, registers=16, k_step=4, row_dtype="uint8")
