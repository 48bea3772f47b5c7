"""Armv8.2 NEON with dotprod: sdot sums four products of signed bytes, exactly."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa._neon import LANES, LaneRow, NeonIsa, fields
from slmtvm.schedules.isa._picking import ListCost
from slmtvm.schedules.isa.base import Buffer, Dot, Expr, Vectors, intrinsic, let, load, splat
from slmtvm.schedules.order import in_first_lane


class _S8S8(LaneRow, Dot):
    state = ("int32x4",)

    def scattered(self, buffer: Buffer, at: Expr) -> Expr:
        word = T.reinterpret("int32", load(buffer, at, 4))
        return self.activation(in_first_lane(word, LANES, "w"), 0)

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        return (let(raw),)

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        total = splat(0, "int32", LANES) if state is None else state[0]
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        return (intrinsic("int32x4", name, total, weight, activation),)

    def start(self, sums: Expr) -> Vectors | None:
        return (sums,)

    def ones(self) -> Expr:
        return splat(1, "int8", 4 * LANES)


class _FieldsS8(_S8S8):
    def __init__(self, bits: int) -> None:
        self._bits = bits

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        return fields(raw, self._bits)


class NeonDotprod(NeonIsa):
    # A dense kernel loads four steps of a row at once, a list each of its own.
    list_cost = ListCost(step=1.5, ends=13)
    list_unroll = 8
    list_cost_of_rows = ListCost(step=2.0, ends=9)
    list_cost_of_turned = ListCost(step=1.05, ends=11)
    listed_blocks = ListCost(step=1.7, ends=12)

    def fields_s8(self, bits: int, rows: int) -> Dot:
        return _FieldsS8(bits)

    def s8_s8(self) -> Dot:
        return _S8S8()

    def s8_row(self) -> Dot:
        return _S8S8()


ISA = NeonDotprod(
    "neon_dotprod", lanes=LANES, registers=32, k_step=4, row_dtype="int8", row_in_registers=True
)
