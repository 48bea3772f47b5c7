"""Instructions of linear kernels that skip zeros, over those of dense ones, on CPUs not here.

One call of a kernel over its grid is counted under qemu-user by the plugin of ``programs``: it is
said to be modelled, since no instruction takes the same time as another on a core.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from bench_sparse import activations, kept_of, pruned
from isa.programs import STATIC_LIBC, count_plugin

from slmtvm.codegen.objects import write_object
from slmtvm.codegen.zig import zig_cc
from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.schedules.isa import WINDOWS
from slmtvm.schedules.kernel import Kernel
from slmtvm.schedules.linear import LinearShape, Weights, blocks, columns, windows
from slmtvm.schedules.linear.shape import COLUMNS, IN_LISTS
from slmtvm.target import Target

ROWS = (1, 64)
CHANNELS, INPUTS = 256, 576
_DRIVER = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
enum { MARK_BEGIN = 9001, MARK_END = 9002 };
void %(name)s(%(signature)s);
static const size_t sizes[] = {%(sizes)s};
int main(int argc, char **argv) {
  void *buffer[%(count)d];
  FILE *in = fopen(argv[1], "rb");
  if (argc != 2 || !in) return 2;
  for (int i = 0; i < %(count)d; ++i) {
    buffer[i] = aligned_alloc(64, (sizes[i] + 127) / 64 * 64);
    if (fread(buffer[i], 1, sizes[i], in) != sizes[i]) return 2;
  }
  syscall(MARK_BEGIN);
  %(name)s(%(arguments)s, 0, %(grid)d);
  syscall(MARK_END);
  return 0;
}
"""


@dataclass(frozen=True)
class Pattern:
    """Zeros, and the part of the dense kernel's instructions that skipping them may take: either
    ``kept`` of each neighbours, or a ``share`` of blocks (channels, inputs)."""

    name: str
    target: str
    goal: float
    kept: tuple[int, int] | None = None
    block: tuple[int, int] = (1, 1)
    share: float = 0.0
    lists: bool = False  # of short blocks, with rows in lanes: for many rows alone
    columns: bool = False

    def weight(self, n: int, k: int) -> np.ndarray:
        if self.kept is not None:
            return kept_of(n, k, *self.kept)
        return pruned(n, k, self.block, self.share)


PATTERNS = (
    Pattern("1:4", "cortex-a78", 0.65, kept=(1, 4)),
    Pattern("8x4, 70%", "cortex-a78", 0.45, block=(8, 4), share=0.7),
    Pattern("8x4 as lists", "cortex-a78", 0.45, block=(8, 4), share=0.7, lists=True),
    Pattern("1x4, 80%", "cortex-a78", 1.0, block=(1, 4), share=0.8, lists=True),
    Pattern("16x1, 50%", "riscv64-rvv", 0.7, block=(16, 1), share=0.5, columns=True),
    Pattern("8x1, 70%", "riscv64-rvv", 1.0, block=(8, 1), share=0.7, columns=True),
)


@dataclass(frozen=True)
class SparseCount:
    """Instructions of a call with so many rows, of the dense and of the sparse kernel."""

    pattern: str
    target: str
    cpu: str
    rows: int
    dense: int
    sparse: int
    goal: float

    @property
    def ratio(self) -> float:
        """Sparse over dense."""
        return self.sparse / self.dense


def count_sparse(pattern: Pattern, cpus: dict[str, str]) -> list[SparseCount]:
    """A pattern's counts for each number of rows, on each CPU that stands for its target."""
    target = Target.load(pattern.target)
    isa = isas.get(target.isa)
    weights = Weights(
        pattern.weight(CHANNELS, INPUTS), np.full(CHANNELS, 0.01, np.float32)
    )  # fmt: skip
    found = []
    for rows in ROWS[-1:] if pattern.lists else ROWS:
        dense = LinearShape(rows, CHANNELS, INPUTS, "int8", "row_u8")
        sparse = replace(dense, sparse=True)
        fitting = [w for w in isa.window_times if windows.fits(WINDOWS[w], weights)]
        if pattern.kept is not None:
            sparse = replace(sparse, window=fitting[0])
        elif pattern.lists:
            sparse = replace(sparse, window=IN_LISTS)
        elif pattern.columns:
            sparse = replace(sparse, window=COLUMNS, turned=columns.turns(rows, isa))
        else:
            sparse = replace(sparse, turned=blocks.turns(rows, isa))
        with tempfile.TemporaryDirectory() as folder:
            plugin = count_plugin(target, Path(folder))
            for label, cpu in cpus.items():
                counts = [
                    _count(shape, weights, target, cpu, plugin, Path(folder))
                    for shape in (dense, sparse)
                ]
                found.append(
                    SparseCount(pattern.name, target.name, label, rows, *counts, pattern.goal)
                )
    return found


def _count(
    shape: LinearShape, weights: Weights, target: Target, cpu: str, plugin: Path, folder: Path
) -> int:
    """Instructions of one call of the kernel."""
    isa = isas.get(target.isa)
    kernel = linear.build(shape, isa)
    given = [*activations(shape, isa), *linear.pack(shape, isa, weights).values()]
    rest = kernel.tensors[len(given) :]
    arrays = [*given, *(np.zeros(tensor.shape, tensor.dtype) for tensor in rest)]
    program = _program(kernel, arrays, target, folder)
    blob = folder / "operands"
    blob.write_bytes(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays))
    command = [f"qemu-{target.arch}", "-cpu", cpu, "-plugin", str(plugin), str(program), str(blob)]
    result = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"^instructions (\d+)$", result.stderr, re.MULTILINE)
    if result.returncode or not found:
        raise SystemExit(f"{' '.join(command)} failed under qemu:\n{result.stderr}")
    return int(found[1])


def _program(
    kernel: Kernel, arrays: Sequence[np.ndarray], target: Target, folder: Path
) -> Path:  # fmt: skip
    name = str(kernel.func.attrs["global_symbol"])
    count = len(arrays)
    (folder / "driver.c").write_text(
        _DRIVER
        % {
            "name": name,
            "signature": ", ".join(["void *"] * count + ["int32_t"] * 2),
            "sizes": ", ".join(str(a.nbytes) for a in arrays),
            "count": count,
            "arguments": ", ".join(f"buffer[{i}]" for i in range(count)),
            "grid": kernel.grid,
        }
    )
    write_object({name: kernel.func}, target, folder / "kernel.o")
    program = folder / "program"
    zig_cc(
        f"{target.arch}-{STATIC_LIBC}",
        ["-O1", "-static", "-o", str(program), str(folder / "driver.c"), str(folder / "kernel.o")],
    )
    return program


def show_sparse(rows: list[SparseCount]) -> str:
    """A line for each; what misses the goal is marked."""
    lines = [f"{'zeros':12} {'target':22} {'rows':>4} {'dense':>12} {'sparse':>12}  ratio"]
    for r in rows:
        missed = "" if r.ratio <= r.goal else f"  above {r.goal}"
        where = f"{r.target} {r.cpu}".strip()
        lines.append(
            f"{r.pattern:12} {where:22} {r.rows:>4} {r.dense:>12,} {r.sparse:>12,}  "
            f"{r.ratio:.2f}{missed}"
        )
    return "\n".join(lines)
