"""What the x86 instruction sets share."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa.base import Buffer, Expr, Row, let, load, splat


def nibbles(raw: Expr, dtype: str, lanes: int) -> tuple[Expr, Expr]:
    """Low and high nibbles of a vector's bytes, as bytes 0..15.

    Computed on 32-bit lanes: x86 cannot shift bytes, and the mask drops what crosses over.
    """
    words = let(T.reinterpret(f"int32x{lanes}", raw))
    mask = splat(0x0F0F0F0F, "int32", lanes)
    low = T.bitwise_and(words, mask)
    high = T.bitwise_and(T.shift_right(words, splat(4, "int32", lanes)), mask)
    return let(T.reinterpret(dtype, low)), let(T.reinterpret(dtype, high))


def broadcast_word(buffer: Buffer, at: Expr, lanes: int) -> Expr:
    """Four bytes from ``at``, repeated in an int32 vector; folds into the instruction using it."""
    return let(T.Broadcast(T.reinterpret("int32", load(buffer, at, 4)), lanes))


class BroadcastRow:
    """The half of ``Dot`` that broadcasts four activations from memory when a step wants them."""

    def row(self, buffer: Buffer, at: Expr) -> Row:
        return buffer, at
