"""AVX-512 with VNNI: vpdpbusd sums four products of an unsigned and a signed byte, exactly."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa.base import (
    Buffer, Dot, Expr, Isa, Vectors, intrinsic, let, load_word, nibbles, splat,
)  # fmt: skip

LANES = 16


class _Vpdpbusd(Dot):
    """``swap``: the weights are the signed operand and the activations the unsigned one."""

    state = ("int32x16",)
    swap = False

    def activations(self, buffer: Buffer, at: Expr, count: int) -> list[Expr]:
        dtype = "uint8x64" if self.swap else "int8x64"
        return [
            let(T.reinterpret(dtype, T.Broadcast(load_word(buffer, at + k), LANES)))
            for k in range(0, count, 4)
        ]

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        total = splat(0, "int32", LANES) if state is None else state[0]
        unsigned, signed = (activation, weight) if self.swap else (weight, activation)
        name = "llvm.x86.avx512.vpdpbusd.512"
        return (intrinsic("int32x16", name, total, unsigned, signed),)


class _U4S8(_Vpdpbusd):
    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        return nibbles(raw, "uint8x64", LANES)


class _S8S8(_Vpdpbusd):
    """Weights become unsigned by adding 128, which ``offset`` tells the kernel to take off again."""

    offset = 128

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        words = T.reinterpret("int32x16", raw)
        flipped = T.bitwise_xor(words, splat(-0x7F7F7F80, "int32", LANES))
        return (let(T.reinterpret("uint8x64", flipped)),)


class _S8Row(_Vpdpbusd):
    swap = True

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        return (let(raw),)

    def ones(self) -> Expr:
        return splat(1, "int8", 4 * LANES)


class Avx512Vnni(Isa):
    def u4_s8(self) -> Dot:
        return _U4S8()

    def s8_s8(self) -> Dot:
        return _S8S8()

    def s8_row(self) -> Dot:
        return _S8Row()


ISA = Avx512Vnni("avx512_vnni", lanes=LANES, registers=32, k_step=4, row_dtype="uint8")
