"""Armv8.0 NEON, without dotprod: widening byte products, added in pairs."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa._neon import LANES, LaneRow, NeonIsa, fields
from slmtvm.schedules.isa.base import Dot, Expr, Vectors, intrinsic, let, splat

_HALVES = (T.vectorlow, T.vectorhigh)


def _products(weight: Expr, activation: Expr) -> list[Expr]:
    """int16 products of bytes, two channels in each vector: smull, smull2."""
    return [
        T.Cast("int16x8", half("int8x8", weight)) * T.Cast("int16x8", half("int8x8", activation))
        for half in _HALVES
    ]


def _sum_pairs(pairs: Expr) -> Expr:
    """int32 sums of neighbouring int16: saddlp, or sadalp where they are added to something."""
    return intrinsic("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", pairs)


class _S8S8(LaneRow, Dot):
    """A state's vectors hold two channels each, two partial sums a channel."""

    state = ("int32x4", "int32x4")

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        return (let(raw),)

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        sums = [_sum_pairs(let(p)) for p in _products(weight, activation)]
        if state is None:
            return tuple(sums)
        return tuple(let(total + s) for total, s in zip(state, sums, strict=True))

    def finish(self, state: Vectors) -> Expr:
        return intrinsic("int32x4", "llvm.aarch64.neon.addp.v4i32", *state)

    def ones(self) -> Expr:
        return splat(1, "int8", 4 * LANES)


class _FieldsS8(_S8S8):
    """A step adds 15 * 127 at most to an int16, and a fifth of that for 2 bits: 16 and 80 steps
    cannot overflow."""

    state = ("int16x8", "int16x8")

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self.max_steps = {4: 16, 2: 80}[bits]

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        return fields(raw, self._bits)

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        products = _products(weight, activation)
        if state is None:
            return tuple(let(p) for p in products)
        return tuple(let(total + p) for total, p in zip(state, products, strict=True))

    def finish(self, state: Vectors) -> Expr:
        low, high = (_sum_pairs(pairs) for pairs in state)
        return intrinsic("int32x4", "llvm.aarch64.neon.addp.v4i32", low, high)


class Neon(NeonIsa):
    def fields_s8(self, bits: int, rows: int) -> Dot:
        return _FieldsS8(bits)

    def s8_s8(self) -> Dot:
        return _S8S8()

    def s8_row(self) -> Dot:
        return _S8S8()


ISA = Neon("neon", lanes=LANES, registers=32, k_step=4, row_dtype="int8", row_in_registers=True)
