"""What the Arm instruction sets share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa._picking import ListCost, PairPicking, Picking, Window
from slmtvm.schedules.isa.base import (
    CHUNK,
    Buffer,
    Dot,
    Expr,
    Isa,
    Row,
    Vectors,
    byte_fields,
    intrinsic,
    let,
    load,
    splat,
)

LANES = 4
BYTES = "int8x16"


def fields(raw: Expr, bits: int) -> tuple[Expr, ...]:
    """The fields of ``bits`` of 16 bytes, the lowest first, as int8."""
    return byte_fields(raw, bits, 16)


class LaneRow:
    """The half of ``Dot`` that loads 16 activations and takes an operand from one of four lanes."""

    def row(self, buffer: Buffer, at: Expr) -> Row:
        return let(T.reinterpret("int32x4", load(buffer, at, CHUNK)))

    def scattered(self, buffer: Buffer, at: Expr) -> Expr:
        word = T.reinterpret("int32", load(buffer, at, 4))  # ld1r
        return let(T.reinterpret(BYTES, T.Broadcast(word, LANES)))

    def turned_rows(self, buffer: Buffer, at: Expr) -> Row:
        return let(load(buffer, at, LANES))

    def activation(self, row: Row, k: int) -> Expr:
        return let(T.reinterpret(BYTES, T.Shuffle([row], [k // 4] * LANES)))


class TablePicking(Picking):
    """TBL picks 16 activations of 16; the steps are those of ``dot``."""

    def __init__(self, dot: Dot) -> None:
        self._dot = dot
        self.state = dot.state

    def row(self, buffer: Buffer, at: Expr) -> Expr:
        return let(load(buffer, at, CHUNK))

    def places(self, raw: Expr) -> tuple[Expr, Expr]:
        low, high = byte_fields(T.reinterpret("uint8x16", raw), 4, 16)
        return low, high

    def weights(self, raw: Expr) -> Expr:
        return self._dot.weights(raw)[0]

    def step(self, state: Vectors, weight: Expr, places: Expr, row: Expr) -> Vectors:
        picked = intrinsic(BYTES, "llvm.aarch64.neon.tbl1.v16i8", row, places)
        return self._dot.step(state, weight, picked)

    def finish(self, state: Vectors) -> Expr:
        return self._dot.finish(state)


class TablePairPicking(PairPicking):
    """TBL picks of 16 activations; the steps are those of ``dot``."""

    def __init__(self, dot: Dot) -> None:
        self._dot = dot
        self.state = dot.state

    def row(self, buffer: Buffer, at: Expr) -> list[Expr]:
        low, high = (let(load(buffer, at + first, CHUNK)) for first in (0, CHUNK))
        return [low, low, high, high]

    def weights(self, raw: Expr) -> tuple[Expr, Expr]:
        low, high = fields(raw, 4)
        eight = splat(8, "int8", CHUNK)
        return let(low - eight), let(high - eight)

    def places(self, raw: Expr) -> list[Expr]:
        """Places among 16."""
        found = []
        for field, two in enumerate(fields(T.reinterpret("uint8x16", raw), 2)):
            first = splat(0x0C0C0808 if field % 2 else 0x04040000, "int32", LANES)
            found.append(let(T.bitwise_or(T.reinterpret("int32x4", two), first)))
        return found

    def step(self, state: Vectors | None, weight: Expr, places: Expr, row: Expr) -> Vectors:
        at = T.reinterpret(BYTES, places)
        picked = intrinsic(BYTES, "llvm.aarch64.neon.tbl1.v16i8", row, at)
        return self._dot.step(state, weight, picked)

    def finish(self, state: Vectors) -> Expr:
        return self._dot.finish(state)


class NeonIsa(Isa):
    """The half of ``Isa`` that does not depend on the dot product."""

    # No time was measured: instructions that 256 channels of 576 and 1536 inputs execute, by
    # scripts/bench_isa.py's count. Without dotprod a step takes more beside its loads.
    list_cost = ListCost(step=1.5, ends=5)
    list_cost_of_rows = ListCost(step=1.3, ends=3)
    list_cost_of_turned = ListCost(step=1.05, ends=4)
    # Not measured either: a TBL beside each step.
    window_times: ClassVar[Mapping[str, tuple[float, float]]] = {
        "4of16": (0.6, 0.6),
        "8of16": (1.2, 1.2),
    }
    listed_rows = ListCost(step=2.5, ends=60)
    listed_blocks = ListCost(step=1.5, ends=12)
    pair_times = (1.5, 1.2)
    prefetch = False  # cores of this class see by themselves that weights are read in order

    def load_halves(self, buffer: Buffer, at: Expr, count: int) -> list[Expr]:
        vectors = []
        for first in range(0, count // 2 * 2, 2):  # a register holds two vectors of float16
            both = let(load(buffer, at + first * LANES, 2 * LANES))
            for half in (T.vectorlow, T.vectorhigh):
                vectors.append(let(self.f16_to_f32(half("float16x4", both))))
        return vectors + super().load_halves(buffer, at + (count // 2 * 2) * LANES, count % 2)

    def picking(self, window: Window) -> Picking:
        return TablePicking(self.s8_row())

    def pair_picking(self) -> PairPicking:
        return TablePairPicking(self.s8_s8())
