"""What the x86 instruction sets share."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa.base import Buffer, Expr, Row, let, load, splat


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
