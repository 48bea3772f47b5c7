"""AVX-512 with VNNI: vpdpbusd sums four products of an unsigned and a signed byte, exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa._picking import ListCost, PairPicking, Picking, Window
from slmtvm.schedules.isa._x86 import (
    BroadcastRow,
    BytePairPicking,
    broadcast_word,
    fields,
    twice,
)
from slmtvm.schedules.isa.base import (
    Buffer,
    Dot,
    Expr,
    Isa,
    Row,
    Vectors,
    intrinsic,
    let,
    load,
    splat,
)

LANES = 16


class _Vpdpbusd(BroadcastRow, Dot):
    """Weights are the unsigned operand."""

    state: tuple[str, ...] = ("int32x16",)

    def activation(self, row: Row, k: int) -> Expr:
        buffer, at = row
        return let(T.reinterpret("int8x64", broadcast_word(buffer, at + k, LANES)))

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        total = splat(0, "int32", LANES) if state is None else state[0]
        name = "llvm.x86.avx512.vpdpbusd.512"
        return (intrinsic("int32x16", name, total, weight, activation),)


class _FieldsS8(_Vpdpbusd):
    def __init__(self, bits: int) -> None:
        self._bits = bits

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        return fields(raw, self._bits, "uint8x64", LANES)


class _U4S8OneRow(_Vpdpbusd):
    """High nibbles stay in place: their sums, apart, are shifted once instead of every weight.

    A weight operand is the place of its sum in the state, and the bytes.
    """

    state = ("int32x16", "int32x16")

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        words = let(T.reinterpret("int32x16", raw))
        masked = [T.bitwise_and(words, splat(m, "int32", LANES)) for m in (0x0F0F0F0F, -0x0F0F0F10)]
        return tuple((place, let(T.reinterpret("uint8x64", m))) for place, m in enumerate(masked))

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        sums = [splat(0, "int32", LANES)] * 2 if state is None else list(state)
        place, operand = weight
        (sums[place],) = super().step((sums[place],), operand, activation)
        return tuple(sums)

    def finish(self, state: Vectors) -> Expr:
        low, high = state
        return let(low + let(T.shift_right(high, splat(4, "int32", LANES))))


class _S8S8(_Vpdpbusd):
    """Weights become unsigned by adding 128, which the kernel takes off again: ``offset``."""

    offset = 128

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        words = T.reinterpret("int32x16", raw)
        flipped = T.bitwise_xor(words, splat(-0x7F7F7F80, "int32", LANES))
        return (let(T.reinterpret("uint8x64", flipped)),)


class _S8Row(BroadcastRow, Dot):
    """Weights are the signed operand. ``lanes``: 16, or 8 for vectors of 256 bits."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self.state = (f"int32x{lanes}",)

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        return (let(raw),)

    def activation(self, row: Row, k: int) -> Expr:
        buffer, at = row
        word = broadcast_word(buffer, at + k, self._lanes)
        return let(T.reinterpret(f"uint8x{4 * self._lanes}", word))

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        total = splat(0, "int32", self._lanes) if state is None else state[0]
        name = f"llvm.x86.avx512.vpdpbusd.{32 * self._lanes}"
        return (intrinsic(self.state[0], name, total, activation, weight),)

    def ones(self) -> Expr:
        return splat(1, "int8", 4 * self._lanes)


class _Picking(Picking):
    """Vectors of 256 bits, as blocks have."""

    def __init__(self) -> None:
        self._dot = _S8Row(8)
        self.state = self._dot.state

    def row(self, buffer: Buffer, at: Expr) -> Expr:
        return let(twice(load(buffer, at, 16)))

    def places(self, raw: Expr) -> tuple[Expr, Expr]:
        low, high = fields(raw, 4, "uint8x32", 8)
        return low, high

    def weights(self, raw: Expr) -> Expr:
        return self._dot.weights(raw)[0]

    def step(self, state: Vectors, weight: Expr, places: Expr, row: Expr) -> Vectors:
        picked = intrinsic("uint8x32", "llvm.x86.avx2.pshuf.b", row, places)
        return self._dot.step(state, weight, picked)


class _Pairs(BytePairPicking):
    def __init__(self) -> None:
        self._dot = _S8Row(8)
        self.state = self._dot.state

    def multiply(self, state: Vectors | None, weight: Expr, picked: Expr) -> Vectors:
        return self._dot.step(state, weight, picked)


class Avx512Vnni(Isa):
    # Not measured: two half vectors for one, three loads each for one load.
    list_cost = ListCost(step=2.5, ends=25)
    list_cost_of_rows = ListCost(step=1.6, ends=10)
    window_times: ClassVar[Mapping[str, tuple[float, float]]] = {
        "4of16": (0.8, 0.8),
        "8of16": (1.5, 1.5),
    }
    listed_rows = ListCost(step=3, ends=60)
    listed_blocks = ListCost(step=1.7, ends=15)
    pair_times = (1.5, 1.5)

    def fields_s8(self, bits: int, rows: int) -> Dot:
        # With 2 bits there are four sums to shift, which costs as much as it saves.
        return _U4S8OneRow() if (bits, rows) == (4, 1) else _FieldsS8(bits)

    def s8_s8(self) -> Dot:
        return _S8S8()

    def s8_row(self) -> Dot:
        return _S8Row(self.lanes)

    def picking(self, window: Window) -> Picking:
        return _Picking()

    def pair_picking(self) -> PairPicking:
        return _Pairs()

    @property
    def for_blocks(self) -> Isa:
        """With vectors of 256 bits, of which a core multiplies twice as many: blocks of 8 channels
        are as narrow as on AVX2, and the same bytes."""
        return dataclasses.replace(self, lanes=8)


ISA = Avx512Vnni("avx512_vnni", lanes=LANES, registers=32, k_step=4, row_dtype="uint8")
