"""What a kernel asks of an ISA: its vector width and its exact integer dot products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa._compacting import Compacting
from slmtvm.schedules.isa._picking import (
    ListCost,
    PairPicking,
    Picking,
    RowPairs,
    TurnedPairs,
    Window,
)
from slmtvm.schedules.order import align_stack, in_order

CHUNK = 16
"""Values of k whose activations are loaded together."""

_STACK_ALIGNMENT = 16  # bytes, of x86 and Arm

MIN_BLOCK_CHANNELS = 8
"""Output channels of a block of sparse weights where vectors are no longer: x86 and Arm share."""

Expr = Any  # a TIR expression, or for operands of Dot.step what the ISA makes of it
Buffer = Any
Vectors = tuple[Expr, ...]
Row = Any  # what Dot.row returns, for Dot.activation alone


class Dot(ABC):
    """An exact integer dot product of one vector of output channels with one row of activations.

    A *step* multiplies ``k_step`` consecutive k of ``lanes`` channels. The sum that ``finish``
    returns is ``sum((q + offset) * a)`` for weights q and activations a as they are stored.
    ``max_steps`` is how many steps a state can take before it could overflow; where it is None,
    a state is int32 and takes as many as int32 allows.
    """

    offset: int = 0
    max_steps: int | None = None
    state: tuple[str, ...]  # dtypes of a state's vectors
    unpacked: str | None = None
    """The dtype of operands of steps where many rows gain from weights that are unpacked once."""

    @abstractmethod
    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        """The operands of consecutive steps that one vector of packed weight bytes holds."""

    @abstractmethod
    def row(self, buffer: Buffer, at: Expr) -> Row:
        """CHUNK activations from ``at``, loaded as suits ``activation``."""

    @abstractmethod
    def activation(self, row: Row, k: int) -> Expr:
        """The operand of the step that covers the values ``k .. k + k_step`` of a ``row``."""

    def scattered(self, buffer: Buffer, at: Expr) -> Expr:
        """The operand of a step on ``k_step`` activations from ``at``; no others are read."""
        return self.activation(self.row(buffer, at), 0)

    def turned_rows(self, buffer: Buffer, at: Expr) -> Row:
        """``k_step`` activations of each of ``lanes`` rows, int32 words from ``at``: those of row i
        are ``activation(row, i * k_step)``. Where there is a ``list_cost_of_turned``."""
        raise NotImplementedError(f"{type(self).__name__} takes no turned rows")

    @abstractmethod
    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        """``state`` plus one step; None is a state of zeros."""

    def ones(self) -> Expr:
        """A weight operand all of whose weights count as 1, to sum activations with."""
        raise NotImplementedError(f"{type(self).__name__} sums no activations")

    def start(self, sums: Expr) -> Vectors | None:
        """A state whose sums are those of an int32 vector; None where there is none, or it would
        cost more than adding them in the end."""
        return None

    def of_tile(self, tile: Any, operands: Any, k: int) -> dict[tuple[int, int], Expr] | None:
        """The sums over ``k`` of all cells of a tile at once, as ``linear.integer.integer_sums``
        has them, without what cells start from; None where steps have to make them."""
        return None

    def settle(self, state: Vectors) -> Vectors:
        """``state`` in the vectors that ``self.state`` names, for a loop to carry.

        What ``step`` returns may be anything that Python can hold.
        """
        return state

    def finish(self, state: Vectors) -> Expr:
        """The int32 vector of sums, one lane for each channel."""
        return state[0]


class RowsDot:
    """An exact int32 dot product of a vector of rows with ``k_step`` weights of one channel.

    The steps are those of ``dot``, an ``Isa.s8_row``, that multiply as many weights as activations
    and do not mind which is which: a lane holds the activations of a row, all lanes the weights.
    """

    def __init__(self, dot: Dot, lanes: int, row_dtype: str) -> None:
        self.dot, self.lanes, self.row_dtype = dot, lanes, row_dtype
        self.state = dot.state

    def turned(self, words: Expr) -> Expr:
        """Four activations in each int32 as ``row_dtype`` says -> as ``rows`` wants them."""
        return words

    def missing(self, weights: np.ndarray) -> np.ndarray | None:
        """What sums of ``weights`` (n, k) lack, (n,) int32; None where that is nothing."""
        return None

    def weight(self, buffer: Buffer, at: Expr) -> Expr:
        """The operand of a step that the weights from ``at`` are."""
        word = T.Broadcast(T.reinterpret("int32", load(buffer, at, 4)), self.lanes)
        return let(T.reinterpret(f"int8x{4 * self.lanes}", word))

    def rows(self, buffer: Buffer, at: Expr) -> Expr:
        """The operand of a step that ``lanes`` rows are, words from ``at``."""
        return let(
            T.reinterpret(f"{self.row_dtype}x{4 * self.lanes}", load(buffer, at, self.lanes))
        )

    def step(self, state: Vectors, weight: Expr, rows: Expr) -> Vectors:
        """``state`` plus one step."""
        return self.dot.step(state, weight, rows)

    def finish(self, state: Vectors) -> Expr:
        """The int32 vector of sums, one lane for each row."""
        return self.dot.finish(state)


@dataclass(frozen=True)
class Isa(ABC):
    """One instruction set.

    ``lanes`` float32 (or int32) fit the vector that kernels compute with. Packed weights hold
    ``panel`` output channels together, a multiple of ``lanes``, and ``k_step`` consecutive k of
    each: targets for which both are equal share them byte for byte. ``row_dtype`` is how the
    activations of "row_u8" are stored: "uint8" q, or "int8" q - 128. ``registers`` vectors of
    ``lanes`` fit the register file; activations take some of them where ``row_in_registers``,
    elsewhere instructions read them from memory or scalar registers.
    """

    name: str
    lanes: int
    registers: int
    k_step: int
    row_dtype: str
    row_in_registers: bool = False
    panel: int = 16

    list_cost: ClassVar[ListCost] = ListCost(step=1.5, ends=15)
    """Of instructions, not measured, as are others where nothing is said: a step loads a place and
    an activation that nothing else reads."""

    list_cost_of_rows: ClassVar[ListCost] = ListCost(step=1.3, ends=10)
    """The same with several rows, whose blocks are loaded once."""

    list_unroll: ClassVar[int] = 4
    """Blocks of a list that one row takes without a loop."""

    list_cost_of_turned: ClassVar[ListCost | None] = None
    """The same with many rows, which come turned; None where that gains nothing."""

    window_times: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """By window that kernels pick from: their time for one row and for several, of the dense
    kernel's with weights in cache. No other windows are picked from."""

    listed_rows: ClassVar[ListCost | None] = None
    """What a kernel on lists of weights takes, rows being lanes, of a dense kernel's time: ``step``
    for each weight, ``ends`` for what does not depend on k; None where there is none."""

    listed_blocks: ClassVar[ListCost | None] = None
    """The same of blocks of ``k_step`` int8 weights on whole rows."""

    listed_weights: ClassVar[ListCost | None] = None
    """The same of single int8 weights, dealt into groups."""

    column_costs: ClassVar[tuple[ListCost, ListCost, ListCost] | None] = None
    """The same of columns of 16 channels, for one row, for a few, and for many, which come turned:
    ``step`` for each weight that is stored."""

    pair_times: ClassVar[tuple[float, float] | None] = None
    """The same of int4 weights in groups, of PAIRS, but for one row with weights from memory; None
    where there is no such kernel."""

    turned_pair_time: ClassVar[float | None] = None
    """The same of these with many rows in lanes, see ``linear.turned_pairs``; None where that gains
    nothing."""

    most_rows: ClassVar[int] = 4
    """Rows of a tile of int8 weights on whole rows, at most."""

    row_pair_times: ClassVar[tuple[float, float] | None] = None
    """The same of int8 weights on whole rows, of PAIRS."""

    native_f16: ClassVar[bool] = True
    """Whether one instruction converts a vector between float16 and float32."""

    pairs_groups: ClassVar[bool] = False
    """Whether several rows gain where two groups of k are multiplied at a time."""

    register: ClassVar[str | None] = None
    """The constraint of inline assembly for a vector register, where kernels gain from being
    compiled in the order in which they are written; see ``schedules.order``."""

    sets_apart: ClassVar[bool] = False
    """Whether kernels of several loops gain where ``order.set_apart`` is between them."""

    prefetch: ClassVar[bool] = True
    """Whether asking for weights ahead gains more than the instructions that do it cost."""

    rows_by_block: ClassVar[bool] = False
    """Whether rows are quantized by kernels whose grid is the blocks of a row (rows.by_block)."""

    divides_heads: ClassVar[bool] = False
    """Whether attention of one token is divided into more blocks than there are kv heads."""

    skips_padding: ClassVar[bool] = True
    """Whether tiles of padding alone can be left out: not where blocks compute together."""

    teams: ClassVar[tuple[int, ...]] = ()
    """What a GPU may have of teams in a block of threads: settings of a knob of that name, of which
    0 leaves it to the grid. Nothing where the blocks of a grid are no threads'."""

    row_groups: ClassVar[int] = 1
    """Groups of a single row's k whose weights are asked for before the first are needed."""

    least_blocks: ClassVar[int] = 8
    """A matrix-vector product is cut in so many blocks where it can be, for threads to share."""

    @property
    def kv_dtype(self) -> str:
        """How the KV cache holds keys and values unless the user says otherwise.

        In float16 it is half as large, and read in half the time once the caches of all layers
        exceed the core's own. Converting with integers (three instructions a vector, beside two or
        three multiply-adds) would cost more than that gains.
        """
        return "float16" if self.native_f16 else "float32"

    @property
    def vectors(self) -> int:
        """Vectors that hold one value for each channel of a panel."""
        return self.panel // self.lanes

    def in_order(self, vectors: Vectors) -> Vectors:
        """``vectors``, computed before what is written later and passes this too."""
        if self.register is None:
            return vectors
        return tuple(in_order(vector, self.register) for vector in vectors)

    def align_stack(self) -> None:
        """To be called where a kernel has more vectors than fit the registers."""
        if self.register is not None and 4 * self.lanes > _STACK_ALIGNMENT:
            align_stack(4 * self.lanes)

    def panels(self, channels: int) -> int:
        """Panels that hold so many output channels; the last may be padded."""
        return -(-channels // self.panel)

    @property
    def for_blocks(self) -> Isa:
        """The ISA with vectors that suit blocks of ``block_channels``."""
        return self

    @property
    def block_channels(self) -> int:
        """Output channels of a block of sparse weights."""
        return max(self.lanes, MIN_BLOCK_CHANNELS)

    @property
    def raw_bytes(self) -> int:
        """Bytes of packed weights that ``Dot.weights`` takes."""
        return self.lanes * self.k_step

    def f16_to_f32(self, halves: Expr) -> Expr:
        """Float32 of a float16 vector of ``lanes``; every finite value exactly."""
        return T.Cast(f"float32x{self.lanes}", halves)

    def load_halves(self, buffer: Buffer, at: Expr, count: int) -> list[Expr]:
        """``count`` vectors of consecutive float16 from ``at``, as float32."""
        return [
            let(self.f16_to_f32(load(buffer, at + v * self.lanes, self.lanes)))
            for v in range(count)
        ]

    @abstractmethod
    def fields_s8(self, bits: int, rows: int) -> Dot:
        """Weights of 2 or 4 bits, 0..3 or 0..15, operands of several steps in a byte (the first in
        the lowest bits), activations -127..127.

        ``rows`` rows of activations use the weights while they are in registers.
        """

    @abstractmethod
    def s8_s8(self) -> Dot:
        """int8 weights -128..127, activations -127..127."""

    @abstractmethod
    def s8_row(self) -> Dot:
        """int8 weights -128..127, activations 0..255 stored as ``row_dtype`` says."""

    def picking(self, window: Window) -> Picking:
        """int8 weights that pick from ``window``, one of ``window_times``; activations 0..255
        stored as ``row_dtype`` says."""
        raise NotImplementedError(f"{self.name} picks from no windows")

    def pair_picking(self) -> PairPicking:
        """int4 weights that pick from PAIRS, where there are ``pair_times``."""
        raise NotImplementedError(f"{self.name} picks no pairs")

    def turned_pairs(self) -> TurnedPairs:
        """The same with rows in lanes, where there is a ``turned_pair_time``."""
        raise NotImplementedError(f"{self.name} turns no pairs")

    def rows_dot(self) -> RowsDot:
        """int8 weights -128..127, activations 0..255 stored as ``row_dtype`` says, rows in lanes,
        where there are ``listed_blocks``."""
        return RowsDot(self.s8_row(), self.lanes, self.row_dtype)

    def compacting(self) -> Compacting:
        """What kernels on columns of weights need, where there are ``column_costs``."""
        raise NotImplementedError(f"{self.name} takes no columns")

    def multiply_bytes(self, unsigned: Expr, signed: Expr) -> Expr:
        """Sums of two neighbouring products of bytes, that fit an int16, where there are
        ``listed_weights``."""
        raise NotImplementedError(f"{self.name} lists no single weights")

    def row_pairs(self) -> RowPairs:
        """int8 weights that pick from PAIRS, where there are ``row_pair_times``."""
        raise NotImplementedError(f"{self.name} picks no pairs of whole rows")


def let(value: Expr) -> Expr:
    """``value``, computed here and once."""
    return T.bind(value)


def splat(value: int | float, dtype: str, lanes: int) -> Expr:
    """A constant in every lane."""
    scalar = T.IntImm(dtype, value) if "int" in dtype else T.FloatImm(dtype, value)
    return T.Broadcast(scalar, lanes)


def load(buffer: Buffer, at: Expr, lanes: int) -> Expr:
    """``lanes`` consecutive elements from ``at``."""
    return buffer[T.ramp(at, 1, lanes)]


def byte_fields(raw: Expr, bits: int, lanes: int) -> tuple[Expr, ...]:
    """The fields of ``bits`` of a vector of bytes, the lowest first, each as an int8."""
    found = []
    for shift in range(0, 8, bits):
        field = T.shift_right(raw, splat(shift, "uint8", lanes)) if shift else raw
        if shift + bits < 8:
            field = T.bitwise_and(field, splat((1 << bits) - 1, "uint8", lanes))
        found.append(let(T.reinterpret(f"int8x{lanes}", field)))
    return tuple(found)


def intrinsic(dtype: str, name: str, *args: Expr) -> Expr:
    """A call of an LLVM intrinsic without side effects, computed here and once."""
    return let(T.call_llvm_pure_intrin(dtype, name, *args))


def prefetch(buffer: Buffer, at: Expr) -> None:
    """Ask for the cache line of element ``at``, which may lie behind the buffer's end."""
    address = T.address_of(buffer[at])
    level = 2  # into the second level: the first is small, and its own prefetcher does the rest
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", address, 0, level, 1))
