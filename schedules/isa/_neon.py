"""What the Arm instruction sets share."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa.base import Buffer, Expr, let, load, splat

LANES = 4
BYTES = "int8x16"


def nibbles(raw: Expr) -> tuple[Expr, Expr]:
    """Low and high nibbles of 16 bytes, as int8 0..15."""
    low = T.bitwise_and(raw, splat(0x0F, "uint8", 16))
    high = T.shift_right(raw, splat(4, "uint8", 16))
    return let(T.reinterpret(BYTES, low)), let(T.reinterpret(BYTES, high))


def broadcast_words(buffer: Buffer, at: Expr, count: int) -> list[Expr]:
    """Each four of ``count`` (a multiple of 16) bytes from ``at``, repeated in 16 bytes.

    Sixteen are loaded at once: the dot product takes its operand from a lane.
    """
    words = []
    for k in range(0, count, 16):
        vector = let(T.reinterpret("int32x4", load(buffer, at + k, 16)))
        for lane in range(LANES):
            words.append(let(T.reinterpret(BYTES, T.Shuffle([vector], [lane] * LANES))))
    return words
