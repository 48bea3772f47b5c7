"""CUDA: a vector of 16 lanes is a team of 16 threads, half a warp, one lane each.

Kernels are written for one instruction set like any other; ``slmtvm.codegen.cuda`` turns their
vectors into threads. Weights are packed as for x86 and Arm, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa._picking import RowPairs
from slmtvm.schedules.isa.base import Buffer, Dot, Expr, Isa, Row, Vectors, let, load, splat

LANES = 16
WORDS = f"int32x{LANES}"

MMA_ROWS, MMA_K = 8, 32
MMA_STATE = f"int32x{MMA_ROWS * LANES}"
"""Sums of two teams, as tensor cores have them, until MMA_SETTLE gives each team its own: lane
``channel * MMA_ROWS + row``."""

MMA_SETTLE = "slm_mma_rows"
MMA_PAIRS = "slm_mma_2of4"
MMA = ("slm_mma_2", "slm_mma_4", "slm_mma_8", MMA_PAIRS, MMA_SETTLE)
"""By bits of a weight: pointers to weights (and places) and activations, bytes from row to row,
the state."""

DP4A = "slm_dp4a"
"""An int32 plus the four products of the signed bytes of two others, each a lane's."""
DP4A_PAIRS = "slm_dp4a_2of4"
"""The same of four weights and those of 8 activations that the lowest byte of a word says."""


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

    def of_tile(self, tile: Any, operands: Any, k: int) -> dict[tuple[int, int], Expr] | None:
        """By tensor cores, which take two teams, so 16 rows, and 16 channels at a time."""
        fits = tile.paired and tile.rows == MMA_ROWS and operands.width == LANES
        if not fits or k % MMA_K or operands.sum_rows:
            return None
        sums = {}
        for v in range(tile.vectors):
            total = self._tile(tile, operands, k, v)
            rows = let(T.call_extern(MMA_STATE, MMA_SETTLE, total))
            for row in range(tile.rows):
                mine = [lane * tile.rows + row for lane in range(LANES)]
                sums[row, v] = let(tirx.Shuffle([rows], mine))
        return sums

    def _tile(self, tile: Any, operands: Any, k: int, v: int) -> Expr:
        carried = T.alloc_buffer((MMA_ROWS * LANES,), "int32", scope="local")
        everything = [T.ramp(0, 1, MMA_ROWS * LANES)]
        T.buffer_store(carried, splat(0, "int32", MMA_ROWS * LANES), everything)
        with T.serial(k // MMA_K) as part:
            at = operands.weight_at(v) + part * (MMA_K * LANES * operands.bits // 8)
            row = operands.row_at(0)
            step = T.call_extern(
                MMA_STATE,
                f"slm_mma_{operands.bits}",
                T.address_of(operands.weights[let(at)]),
                T.address_of(operands.activations[let(row + part * MMA_K)]),
                let(operands.row_at(1) - row),
                carried[everything[0]],
            )
            T.buffer_store(carried, let(step), everything)
        return let(carried[everything[0]])


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


class _RowPairs(RowPairs):
    """Places select bytes of two registers of activations."""

    def places(self, buffer: Buffer, at: Expr) -> Expr:
        return let(T.reinterpret(WORDS, load(buffer, at, 4 * LANES)))

    weights = places

    def row(self, buffer: Buffer, at: Expr) -> tuple[Expr, Expr]:
        first, second = (let(T.reinterpret("int32", load(buffer, at + i, 4))) for i in (0, 4))
        return let(T.Broadcast(first, LANES)), let(T.Broadcast(second, LANES))

    def step(self, total: Expr, weight: Expr, places: Expr, number: int, row: Any) -> Expr:
        own = let(T.shift_right(places, splat(8 * number, "int32", LANES))) if number else places
        return let(T.call_extern(WORDS, DP4A_PAIRS, weight, own, *row, total))

    def of_tile(
        self, shape: Any, tile: Any, named: Mapping[str, Buffer]
    ) -> dict[tuple[int, int], Expr] | None:
        """As ``_S8S8.of_tile``, by tensor cores that skip what is left out."""
        from slmtvm.schedules.linear import row_pairs

        if not tile.paired or tile.rows != MMA_ROWS:
            return None
        sums = {}
        everything = [T.ramp(0, 1, MMA_ROWS * LANES)]
        for v in range(tile.vectors):
            carried = T.alloc_buffer((MMA_ROWS * LANES,), "int32", scope="local")
            T.buffer_store(carried, splat(0, "int32", MMA_ROWS * LANES), everything)
            with T.serial(shape.k // row_pairs.UNIT) as part:
                weights = row_pairs.weight_at(shape, tile, v) + part * (row_pairs.UNIT // 2 * LANES)
                units = row_pairs.UNIT // row_pairs.PLACES_UNIT
                places = row_pairs.places_at(shape, tile, v) + part * (units * 4 * LANES)
                row = tile.row(0) * shape.padded_k
                step = T.call_extern(
                    MMA_STATE, MMA_PAIRS,
                    T.address_of(named["weight"][let(weights)]),
                    T.address_of(named["places"][let(places)]),
                    T.address_of(named["xq"][let(row + part * row_pairs.UNIT)]),
                    T.int32(shape.padded_k),
                    carried[everything[0]],
                )  # fmt: skip
                T.buffer_store(carried, let(step), everything)
            rows = let(T.call_extern(MMA_STATE, MMA_SETTLE, let(carried[everything[0]])))
            for r in range(tile.rows):
                mine = [lane * tile.rows + r for lane in range(LANES)]
                sums[r, v] = let(tirx.Shuffle([rows], mine))
        return sums


class Cuda(Isa):
    prefetch = False
    rows_by_block = True
    skips_padding = False
    divides_heads = True
    least_blocks = 4096  # teams that a GPU of any size can run at once
    teams = (0, 2, 4, 8, 16)
    row_groups = 4
    most_rows = MMA_ROWS
    row_pair_times = (1.0, 1.0)  # not measured: taken on request alone

    def fields_s8(self, bits: int, rows: int) -> Dot:
        return _FieldsS8(bits)

    def s8_s8(self) -> Dot:
        return _S8S8()

    def s8_row(self) -> Dot:
        return _S8S8()

    def row_pairs(self) -> RowPairs:
        return _RowPairs()


ISA = Cuda("cuda", lanes=LANES, registers=64, k_step=4, row_dtype="int8")
