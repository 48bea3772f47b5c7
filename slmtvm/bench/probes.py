"""Two kernels that do nothing but reach a limit of the machine: reading, and integer dot products.

They are made of the same primitives as the kernels of a model, for the same target, so the limit is
that of the instructions a model may use.
"""

from __future__ import annotations

import ctypes
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.codegen.objects import write_object
from slmtvm.codegen.zig import zig_cc
from slmtvm.schedules import isa as isas
from slmtvm.schedules import vector as vec
from slmtvm.schedules.isa.base import CHUNK, Buffer, Dot, Expr, Isa, let, prefetch
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.linear.tile import Registers
from slmtvm.target import Target
from slmtvm.tuning.inputs import BYTES, OUTPUT, Fill

PIECE_BYTES = 16 * 1024  # that a block of the reading kernel reads
DOT_STEPS = 64  # with operands of their own: 8 KiB of weights at most
_DOT_PASSES = 8  # over them in a block; few enough that no sum of ones overflows
_DOT_VECTORS = 2  # of weights that a tile of the dot product kernel is wide
_OPERAND_REGISTERS = 8  # what a tile leaves for operands; sums take the rest, but not less than:
_LEAST_SUMS = 4
_WEIGHT_DTYPES = {4: "uint8", 8: "int8"}
_ACCUMULATORS = 4  # of the reading kernel, of 16 lanes each
# How far ahead of its use a cache line is asked for, in bytes; 0 leaves it to the hardware.
READ_AHEAD = (0, 1024, 4096, 16384)


def read_kernel(ahead: int, pieces: int) -> Kernel:
    """data int32 (pieces, PIECE_BYTES / 4) -> out (pieces, 16): sums, so that all is read."""
    words = PIECE_BYTES // 4
    step = _ACCUMULATORS * vec.LANES

    def body(block: Expr, data: Buffer, out: Buffer) -> None:
        sums = Registers("int32", vec.LANES, _ACCUMULATORS)
        with T.serial(words // step) as part:
            at = let(block * words + part * step)
            for i in range(_ACCUMULATORS):
                if ahead:
                    prefetch(data, at + i * vec.LANES + ahead // 4)
                sums[i] = sums[i] + vec.load(data, at + i * vec.LANES)
        total = sums[0]
        for i in range(1, _ACCUMULATORS):
            total = let(total + sums[i])
        vec.store(out, block * vec.LANES, total)

    tensors = [
        Tensor("data", (pieces, words), "int32"),
        Tensor("out", (pieces, vec.LANES), "int32"),
    ]
    return define(f"read_ahead{ahead}", tensors, body, grid=pieces, outputs=["out"])


@dataclass(frozen=True)
class DotProbe:
    """A kernel that multiplies without pause, and how many multiply-adds one block of it is."""

    kernel: Kernel
    block_multiply_adds: int


def dot_kernels(isa: Isa, blocks: int) -> list[DotProbe]:
    """One for each of the ISA's dot products: which is the fastest depends on the ISA."""
    rows = max(isa.registers - _OPERAND_REGISTERS, _LEAST_SUMS) // _DOT_VECTORS
    return [
        _dot_kernel(isa, "u4_s8", isa.fields_s8(4, rows), rows, 4, "int8", blocks),
        _dot_kernel(isa, "s8_s8", isa.s8_s8(), rows, 8, "int8", blocks),
        _dot_kernel(isa, "s8_row", isa.s8_row(), rows, 8, isa.row_dtype, blocks),
    ]


def _dot_kernel(
    isa: Isa, kind: str, dot: Dot, rows: int, bits: int, activation_dtype: str, blocks: int
) -> DotProbe:
    """A tile of independent sums.

    weights (DOT_STEPS, vectors * raw_bytes) and activations (rows, DOT_STEPS * CHUNK), all 1
    -> out int32 (blocks, lanes). Operands come from the first-level cache and are new in each step,
    so that no product can be kept from an earlier one.
    """
    cells = [(row, vector) for row in range(rows) for vector in range(_DOT_VECTORS)]
    parts = 8 // bits  # operands in a byte

    def body(block: Expr, weights: Buffer, activations: Buffer, out: Buffer) -> None:
        # One for each vector of a state.
        kept = [Registers(*_dtype(vector), len(cells)) for vector in dot.state]
        with T.serial(_DOT_PASSES), T.serial(DOT_STEPS) as step:
            loaded = [
                dot.row(activations, let((step + r * DOT_STEPS) * CHUNK)) for r in range(rows)
            ]
            operands = [
                dot.weights(let(weights[T.ramp(at * isa.raw_bytes, 1, isa.raw_bytes)]))
                for at in (let(step * _DOT_VECTORS + v) for v in range(_DOT_VECTORS))
            ]
            for part in range(parts):
                wanted = [dot.activation(row, part * isa.k_step) for row in loaded]
                for index, (row, vector) in enumerate(cells):
                    state = tuple(registers[index] for registers in kept)
                    after = dot.settle(dot.step(state, operands[vector][part], wanted[row]))
                    for registers, value in zip(kept, after, strict=True):
                        registers[index] = value
        total = None
        for index in range(len(cells)):
            sums = dot.finish(tuple(registers[index] for registers in kept))
            total = sums if total is None else let(total + sums)
        T.buffer_store(out, total, [T.ramp(block * isa.lanes, 1, isa.lanes)])

    tensors = [
        Tensor("weights", (DOT_STEPS, _DOT_VECTORS * isa.raw_bytes), _WEIGHT_DTYPES[bits]),
        Tensor("activations", (rows, DOT_STEPS * CHUNK), activation_dtype),
        Tensor("out", (blocks, isa.lanes), "int32"),
    ]
    kernel = define(f"dot_{kind}_{isa.name}", tensors, body, grid=blocks, outputs=["out"])
    steps = _DOT_PASSES * DOT_STEPS * parts * len(cells)
    return DotProbe(kernel, steps * isa.lanes * isa.k_step)


def _dtype(vector: str) -> tuple[str, int]:
    """ "int32x16" -> ("int32", 16)"""
    kind, _, lanes = vector.partition("x")
    return kind, int(lanes)


def fills(kernel: Kernel) -> list[Fill]:
    """For programs that measure probes elsewhere: ones, which no sum of them overflows."""
    outputs = kernel.outputs
    return [
        Fill(_nbytes(t), OUTPUT, result=True)
        if t.name in outputs
        else Fill(_nbytes(t), BYTES, 1, 1)
        for t in kernel.tensors
    ]


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


_DRIVER = r"""
#include <stdint.h>
#define EXPORT __attribute__((visibility("default")))
"""
_REPEAT = r"""
void %(name)s(%(pointers)s, int32_t, int32_t);
EXPORT void repeat_%(name)s(void **a, int32_t begin, int32_t end, int32_t times) {
  for (int32_t i = 0; i < times; ++i) %(name)s(%(arguments)s, begin, end);
}
"""


@dataclass(frozen=True)
class Probe:
    """A probe as a C function: ``run(pointers to the buffers, begin, end, times)``."""

    name: str
    run: Callable[[Sequence[int], int, int, int], None]


def build_probes(target: Target, kernels: Sequence[Kernel]) -> list[Probe]:
    """The kernels compiled for this machine, each with a loop around it."""
    names = [str(k.func.attrs["global_symbol"]) for k in kernels]
    source = _DRIVER + "".join(
        _REPEAT
        % {
            "name": name,
            "pointers": ", ".join(["void *"] * len(kernel.tensors)),
            "arguments": ", ".join(f"a[{i}]" for i in range(len(kernel.tensors))),
        }
        for name, kernel in zip(names, kernels, strict=True)
    )
    with tempfile.TemporaryDirectory() as folder:
        code, driver = Path(folder) / "probes.o", Path(folder) / "driver.c"
        library = Path(folder) / "probes.so"
        write_object({n: k.func for n, k in zip(names, kernels, strict=True)}, target, code)
        driver.write_text(source, encoding="utf-8")
        zig_cc(target.link, ["-O2", "-shared", "-o", str(library), str(driver), str(code)])
        loaded = ctypes.CDLL(str(library))
    return [Probe(name, _caller(loaded, name)) for name in names]


def _caller(library: ctypes.CDLL, name: str) -> Callable[[Sequence[int], int, int, int], None]:
    function = getattr(library, f"repeat_{name}")
    function.restype = None
    function.argtypes = (ctypes.POINTER(ctypes.c_void_p), *[ctypes.c_int32] * 3)

    def run(pointers: Sequence[int], begin: int, end: int, times: int) -> None:
        function((ctypes.c_void_p * len(pointers))(*pointers), begin, end, times)

    return run


def isa_of(target: Target) -> Isa:
    """The primitives that the kernels of ``target`` are made of."""
    return isas.get(target.isa)
