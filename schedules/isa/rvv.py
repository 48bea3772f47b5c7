"""RISC-V V 1.0 at any vector length from 128 bits: widening multiply-adds, one channel a lane.

Vectors have a fixed length of 32 lanes: LLVM sets vl to 32 and uses the register groups that 128
bits need (8 registers for float32), which is right for longer registers too. A scalar activation
and the instruction that multiplies by it then serve 32 channels.
"""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa.base import (
    Buffer,
    Dot,
    Expr,
    Isa,
    ListCost,
    Row,
    Vectors,
    byte_fields,
    let,
    splat,
)
from slmtvm.schedules.vector import half_to_float

LANES = 32
PRODUCTS, SUMS = (f"int{bits}x{LANES}" for bits in (16, 32))


class _ScalarActivations(Dot):
    """An activation is a scalar, a weight an int8 vector."""

    def row(self, buffer: Buffer, at: Expr) -> Row:
        return buffer, at

    def activation(self, row: Row, k: int) -> Expr:
        buffer, at = row
        return let(T.Cast("int16", buffer[at + k]))


def _products(weight: Expr, activation: Expr) -> Expr:
    """int16 products of bytes: vwmul.vx, or vwmacc.vx where they are added to something."""
    return T.Cast(PRODUCTS, weight) * T.Broadcast(activation, LANES)


class _FieldsS8(_ScalarActivations):
    """A step adds 15 * 127 at most to an int16, and a fifth of that for 2 bits: 16 and 80 steps
    cannot overflow."""

    state = (PRODUCTS,)

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self.max_steps = {4: 16, 2: 80}[bits]

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        return byte_fields(raw, self._bits, LANES)

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        products = _products(weight, activation)
        return (let(products if state is None else state[0] + products),)

    def finish(self, state: Vectors) -> Expr:
        return let(T.Cast(SUMS, state[0]))


class _S8Row(_ScalarActivations):
    """Products of 128 * 128 fit an int16, sums of two need not."""

    state = (SUMS,)

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        return (let(raw),)

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        wide = let(T.Cast(SUMS, let(_products(weight, activation))))
        return (wide if state is None else let(state[0] + wide),)

    def ones(self) -> Expr:
        return splat(1, "int8", LANES)


class _S8S8(_S8Row):
    """Two products of 128 * 127 fit an int16: only their sum is widened.

    Between steps a state is the sums (None for zeros) and a product that waits for the next.
    """

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        total, *waiting = state or (None,)
        products = _products(weight, activation)
        if not waiting:
            return total, let(products)
        return self.settle((total, let(waiting[0] + products)))

    def settle(self, state: Vectors) -> Vectors:
        total, *waiting = state
        for products in waiting:
            wide = T.Cast(SUMS, products)
            total = let(wide if total is None else total + wide)
        return (total,)

    def finish(self, state: Vectors) -> Expr:
        return self.settle(state)[0]


class Rvv(Isa):
    native_f16 = False
    prefetch = False
    # Instructions, counted as those of Arm are: a step of one row widens its products, and a dense
    # kernel adds several of these before it does.
    list_cost = ListCost(step=2.3, ends=10)
    list_cost_of_rows = ListCost(step=1.25, ends=4)

    def f16_to_f32(self, halves: Expr) -> Expr:
        return half_to_float(T.reinterpret(f"uint16x{LANES}", halves))

    def fields_s8(self, bits: int, rows: int) -> Dot:
        return _FieldsS8(bits)

    def s8_s8(self) -> Dot:
        return _S8S8()

    def s8_row(self) -> Dot:
        return _S8Row()


ISA = Rvv("rvv", lanes=LANES, registers=4, k_step=1, row_dtype="int8", panel=LANES)
