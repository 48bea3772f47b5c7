"""What the x86 instruction sets share."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa.base import Buffer, Expr, let, load, splat


def nibbles(raw: Expr, dtype: str, lanes: int) -> tuple[Expr, Expr]:
    """Low and high nibbles of a vector's bytes, as bytes 0..15.

    Computed on 32-bit lanes: x86 cannot shift bytes, and the mask drops what crosses over.
    """
    words = let(T.reinterpret(f"int32x{lanes}", raw))
    mask = splat(0x0F0F0F0F, "int32", lanes)
    low = T.bitwise_and(words, mask)
    high = T.bitwise_and(T.shift_right(words, splat(4, "int32", lanes)), mask)
    return let(T.reinterpret(dtype, low)), let(T.reinterpret(dtype, high))


def broadcast_words(buffer: Buffer, at: Expr, count: int, lanes: int) -> list[Expr]:
    """Each four of ``count`` bytes from ``at``, repeated in an int32 vector."""
    words = [T.reinterpret("int32", load(buffer, at + k, 4)) for k in range(0, count, 4)]
    return [let(T.Broadcast(word, lanes)) for word in words]
