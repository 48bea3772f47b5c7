"""CUDA: a vector of 16 lanes is a team of 16 threads, half a warp, one lane each.

Kernels are written for one instruction set like any other; ``slmtvm.codegen.cuda`` turns their
vectors into threads. Weights are packed as for x86 and Arm, byte for byte.
"""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa.base import Buffer, Dot, Expr, Isa, Row, Vectors, let, load, splat

LANES = 16
WORDS = f"int32x{LANES}"

DP4A = "slm_dp4a"
"""An int32 plus the four products of the signed bytes of two others, each a lane's."""


class _S8S8(Dot):
    """A lane's weights of a step are the four bytes of its int32, an activation a splat one."""

    state = (WORDS,)

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        return (let(T.reinterpret(WORDS, raw)),)

    def row(self, buffer: Buffer, at: Expr) -> Row:
        return buffer, at

    def activation(self, row: Row, k: int) -> Expr:
        buffer, at = row
        return let(T.Broadcast(let(T.reinterpret("int32", load(buffer, at + k, 4))), LANES))

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        total = splat(0, "int32", LANES) if state is None else state[0]
        return (let(T.call_extern(WORDS, DP4A, weight, activation, total)),)

    def start(self, sums: Expr) -> Vectors | None:
        return (sums,)

    def ones(self) -> Expr:
        return splat(0x01010101, "int32", LANES)


class _FieldsS8(_S8S8):
    """Fields of four bytes are taken apart at once."""

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        words = let(T.reinterpret(WORDS, raw))
        mask = splat(((1 << self._bits) - 1) * 0x01010101, "int32", LANES)
        return tuple(
            let(T.bitwise_and(T.shift_right(words, splat(shift, "int32", LANES)), mask))
            for shift in range(0, 8, self._bits)
        )


class Cuda(Isa):
    prefetch = False
    least_blocks = 4096  # teams that a GPU of any size can run at once

    def fields_s8(self, bits: int, rows: int) -> Dot:
        return _FieldsS8(bits)

    def s8_s8(self) -> Dot:
        return _S8S8()

    def s8_row(self) -> Dot:
        return _S8S8()


ISA = Cuda("cuda", lanes=LANES, registers=64, k_step=4, row_dtype="int8")
