"""What the x86 instruction sets share."""

from __future__ import annotations

from abc import abstractmethod

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa._picking import PairPicking
from slmtvm.schedules.isa.base import Buffer, Expr, Row, Vectors, intrinsic, let, load, splat


def fields(raw: Expr, bits: int, dtype: str, lanes: int) -> tuple[Expr, ...]:
    """The fields of ``bits`` of a vector's bytes, the lowest first, each as a byte.

    Computed on 32-bit lanes: x86 cannot shift bytes, and the mask drops what crosses over.
    """
    words = let(T.reinterpret(f"int32x{lanes}", raw))
    mask = splat(0x01010101 * ((1 << bits) - 1), "int32", lanes)
    found = []
    for shift in range(0, 8, bits):
        moved = T.shift_right(words, splat(shift, "int32", lanes)) if shift else words
        found.append(let(T.reinterpret(dtype, T.bitwise_and(moved, mask))))
    return tuple(found)


def broadcast_word(buffer: Buffer, at: Expr, lanes: int) -> Expr:
    """Four bytes from ``at``, repeated in an int32 vector; folds into the instruction using it."""
    return let(T.Broadcast(T.reinterpret("int32", load(buffer, at, 4)), lanes))


def twice(sixteen: Expr) -> Expr:
    """16 bytes in both halves of a vector of 256 bits."""
    half = let(sixteen)
    return T.Shuffle([half, half], [*range(32)])


class BroadcastRow:
    """The half of ``Dot`` that broadcasts four activations from memory when a step wants them."""

    def row(self, buffer: Buffer, at: Expr) -> Row:
        return buffer, at


class BytePairPicking(PairPicking):
    """Vectors of 256 bits; activations become unsigned, as products of bytes need one of them:
    0..255, which is 128 more."""

    offset = 128

    def row(self, buffer: Buffer, at: Expr) -> list[Expr]:
        found = []
        for first in (0, 16):
            words = T.reinterpret("int32x8", twice(load(buffer, at + first, 16)))
            both = let(T.bitwise_xor(words, splat(-0x7F7F7F80, "int32", 8)))
            eights = let(T.reinterpret("int64x4", both))
            found += [both, let(T.Shuffle([eights], [1, 1, 3, 3]))]
        return [let(T.reinterpret("uint8x32", f)) for f in found]

    def weights(self, raw: Expr) -> tuple[Expr, Expr]:
        low, high = fields(raw, 4, "int8x32", 8)
        eight = splat(8, "int8", 32)
        return let(low - eight), let(high - eight)

    def places(self, raw: Expr) -> list[Expr]:
        """Places among 8, in the lower halves of bytes: what stands in the upper ones is not looked
        at but for the highest bit, which is 0."""
        words = let(T.reinterpret("int32x8", raw))
        found = []
        for shift in (0, 2):
            moved = T.shift_right(words, splat(shift, "int32", 8)) if shift else words
            two = T.bitwise_and(moved, splat(0x33333333, "int32", 8))
            both = let(T.bitwise_or(two, splat(0x44440000, "int32", 8)))
            found += [both, let(T.shift_right(both, splat(4, "int32", 8)))]
        return [let(T.reinterpret("uint8x32", found[step])) for step in (0, 2, 1, 3)]

    def pick(self, row: Expr, places: Expr) -> Expr:
        return intrinsic("uint8x32", "llvm.x86.avx2.pshuf.b", row, places)

    def step(self, state: Vectors | None, weight: Expr, places: Expr, row: Expr) -> Vectors:
        return self.multiply(state, weight, self.pick(row, places))

    @abstractmethod
    def multiply(self, state: Vectors | None, weight: Expr, picked: Expr) -> Vectors:
        """``state`` plus the products of ``weight`` and the activations that it picked."""
