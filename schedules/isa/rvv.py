"""RISC-V V 1.0 at any vector length from 128 bits: widening multiply-adds, one channel a lane.

Vectors have a fixed length of 32 lanes: LLVM sets vl to 32 and uses the register groups that 128
bits need (8 registers for float32), which is right for longer registers too. A scalar activation
and the instruction that multiplies by it then serve 32 channels.
"""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa._compacting import Compacting
from slmtvm.schedules.isa._picking import ListCost
from slmtvm.schedules.isa.base import Buffer, Dot, Expr, Isa, Row, Vectors, byte_fields, let, splat
from slmtvm.schedules.order import written_call
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
    """Sums of two products need not fit an int16: weights are widened, and vwmacc.vx adds products
    of int16 to int32, without a change of the type of a vector's elements."""

    state = (SUMS,)

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        return (let(T.Cast(PRODUCTS, raw)),)

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        wide = T.Cast(SUMS, weight) * T.Broadcast(T.Cast("int32", activation), LANES)
        return (let(wide if state is None else state[0] + wide),)

    def ones(self) -> Expr:
        return splat(1, "int16", LANES)


class _S8S8(_ScalarActivations):
    """Two products of 128 * 127 fit an int16: only their sum is widened.

    Between steps a state is the sums (None for zeros) and a product that waits for the next.
    """

    state = (SUMS,)

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        return (let(raw),)

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


class _Compacting(Compacting):
    """vcompress.vm, loads and stores with a stride, vredsum.vs: TVM knows none of them."""

    sum_lanes = 4

    def together(self, values: Expr, words: Expr) -> Expr:
        dtype = str(values.ty.dtype)
        element, lanes = dtype.removeprefix("u").removeprefix("int").split("x")
        vector, bits = f"<{lanes} x i{element}>", f"<{int(lanes) // 16} x i16>"
        suffix = f"v{lanes}i{element}"
        name = f"slm_together_{suffix}"
        if lanes == "16":
            bits = "i16"
        code = (
            f"define {vector} @{name}({vector} %values, {bits} %words) {{\n"
            f"  %mask = bitcast {bits} %words to <{lanes} x i1>\n"
            f"  %kept = call {vector} @llvm.experimental.vector.compress.{suffix}"
            f"({vector} %values, <{lanes} x i1> %mask, {vector} zeroinitializer)\n"
            f"  ret {vector} %kept\n}}\n"
        )
        return let(written_call(dtype, name, code, values, words))

    def load_apart(self, buffer: Buffer, at: Expr, stride: int, count: Expr) -> Expr:
        name, vector = "slm_load_apart", f"<{LANES} x i8>"
        code = (
            f"define {vector} @{name}(ptr %at, i64 %stride, i32 %count) {{\n"
            f"  %read = call {vector} @llvm.experimental.vp.strided.load.v{LANES}i8.p0.i64"
            f"(ptr %at, i64 %stride, <{LANES} x i1> splat (i1 true), i32 %count)\n"
            f"  %kept = call {vector} @llvm.vp.merge.v{LANES}i8(<{LANES} x i1> splat (i1 true), "
            f"{vector} %read, {vector} zeroinitializer, i32 %count)\n"
            f"  ret {vector} %kept\n}}\n"
        )
        address = T.address_of(buffer[at])
        return let(written_call(f"int8x{LANES}", name, code, address, T.int64(stride), count))

    def store_apart(self, buffer: Buffer, at: Expr, stride: int, value: Expr) -> None:
        name, vector = "slm_store_apart", f"<{LANES} x i32>"
        code = (
            f"define i32 @{name}({vector} %value, ptr %at, i64 %stride) {{\n"
            f"  call void @llvm.experimental.vp.strided.store.v{LANES}i32.p0.i64({vector} %value, "
            f"ptr %at, i64 %stride, <{LANES} x i1> splat (i1 true), i32 {LANES})\n"
            f"  ret i32 0\n}}\n"
        )
        address = T.address_of(buffer[at])
        T.evaluate(written_call("int32", name, code, value, address, T.int64(4 * stride)))

    def add_lanes(self, total: Expr, values: Expr) -> Expr:
        lanes = int(str(values.ty.dtype).removeprefix("int16x"))
        name = f"slm_add_lanes_{lanes}"
        # Vectors of registers whose length is not known, as the instruction has it.
        sums, vector = "<vscale x 2 x i32>", f"<vscale x {lanes // 2} x i16>"
        types = f"nxv2i32.nxv{lanes // 2}i16"
        code = (
            f"define <4 x i32> @{name}(<4 x i32> %total, <{lanes} x i16> %values) {{\n"
            f"  %before = call {sums} @llvm.vector.insert.nxv2i32.v4i32"
            f"({sums} poison, <4 x i32> %total, i64 0)\n"
            f"  %all = call {vector} @llvm.vector.insert.nxv{lanes // 2}i16.v{lanes}i16"
            f"({vector} poison, <{lanes} x i16> %values, i64 0)\n"
            f"  %after = call {sums} @llvm.riscv.vwredsum.{types}.i64"
            f"({sums} poison, {vector} %all, {sums} %before, i64 {lanes})\n"
            f"  %kept = call <4 x i32> @llvm.vector.extract.v4i32.nxv2i32({sums} %after, i64 0)\n"
            f"  ret <4 x i32> %kept\n}}\n"
        )
        return let(written_call("int32x4", name, code, total, values))

    def first(self, total: Expr) -> Expr:
        return T.Shuffle([total], [0])


class Rvv(Isa):
    native_f16 = False
    prefetch = False
    # Instructions, counted as those of Arm are: a list takes a step's place and activation each for
    # itself. Columns are dot products along k, which take fewer than the dense kernel's steps.
    list_cost = ListCost(step=3.5, ends=25)
    list_cost_of_rows = ListCost(step=1.47, ends=10)
    column_costs = (
        ListCost(step=0.63, ends=65),
        ListCost(step=0.8, ends=75),
        ListCost(step=1.16, ends=40),
    )

    def compacting(self) -> Compacting:
        return _Compacting()

    def f16_to_f32(self, halves: Expr) -> Expr:
        return half_to_float(T.reinterpret(f"uint16x{LANES}", halves))

    def fields_s8(self, bits: int, rows: int) -> Dot:
        return _FieldsS8(bits)

    def s8_s8(self) -> Dot:
        return _S8S8()

    def s8_row(self) -> Dot:
        return _S8Row()


ISA = Rvv("rvv", lanes=LANES, registers=4, k_step=1, row_dtype="int8", panel=LANES)
