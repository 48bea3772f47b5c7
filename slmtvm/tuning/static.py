"""What a setting costs by its code alone, without a device: a first pass, and a filter.

The assembly of a kernel is a nest of loops whose counts are those of its TIR. Each level's
instructions take the cycles that llvm-mca says of the target's core in a steady state, or where it
is missing or does not know the core, one each. Memory and caches are not seen: kernels of one row
are bound by these, and their order is little more than a guess.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from slmtvm.codegen.cuda.hazards import children
from slmtvm.codegen.objects import build_module
from slmtvm.host import runs_here
from slmtvm.schedules import isa as isas
from slmtvm.schedules.kernel import Kernel
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from slmtvm.tuning.tasks import TaskKey

INSTRUCTIONS = "instructions"
"""How costs were found where llvm-mca was not asked."""
_LABEL = re.compile(r"(\.LBB\d+_\d+):")
_INSTRUCTION = re.compile(r"\s+([a-z][\w.]*)\b(.*)")
_TARGET_OF_BRANCH = re.compile(r"(\.LBB\d+_\d+)\s*$")
_CYCLES = re.compile(r"Total Cycles:\s+(\d+)")
_ITERATIONS = 20
_UNKNOWN_ROUNDS = 64  # of loops over positions
_MCA_SECONDS = 120.0


@dataclass(frozen=True)
class Loop:
    """Instructions that are run ``count`` times, those of loops inside left out."""

    instructions: tuple[str, ...]
    count: float


class StaticModel:
    """Costs of kernels for ``target``; ``by`` says how they are found: "llvm-mca CPU" or
    "instructions"."""

    def __init__(self, target: Target) -> None:
        self._target, self._isa = target, isas.get(target.isa)
        self._program, self._cpu = _llvm_mca(), ""
        if self._program:
            self._cpu = next((c for c in _cores(target) if self._knows(c)), "")
        self.by = f"llvm-mca {self._cpu}" if self._cpu else INSTRUCTIONS

    def costs(self, key: TaskKey, settings: Sequence[Knobs]) -> list[float]:
        """Of each setting: cycles of a whole call, or instructions."""
        template = TEMPLATES[key.kind]
        kernels = [template.build(key.shape, self._isa, knobs) for knobs in settings]
        functions = {f"candidate_{i}": k.func for i, k in enumerate(kernels)}
        text = build_module(functions, self._target).inspect_source("asm")
        nests = [
            loop_nest(function_lines(text, name), loop_counts(kernel))
            for name, kernel in zip(functions, kernels, strict=True)
        ]
        if self._cpu:
            cycles = self._mca([loop.instructions for nest in nests for loop in nest], self._cpu)
            if cycles is not None:
                each = iter(cycles)
                return [sum(next(each) * loop.count for loop in nest) for nest in nests]
        return [sum(len(loop.instructions) * loop.count for loop in nest) for nest in nests]

    def _knows(self, cpu: str) -> bool:
        return self._mca([("nop",)], cpu) is not None

    def _mca(self, regions: Sequence[Sequence[str]], cpu: str) -> list[float] | None:
        """Cycles of each region once, in a steady state; None where llvm-mca cannot tell."""
        assert self._program
        lines = []
        for i, region in enumerate(regions):
            lines += [f"# LLVM-MCA-BEGIN r{i}", *(region or ("nop",)), f"# LLVM-MCA-END r{i}"]
        if not self._target.arch.startswith("x86"):
            lines = [line.replace("# LLVM", "// LLVM") for line in lines]
        command = [
            self._program, f"-mtriple={self._target.arch}-linux-gnu", f"-mcpu={cpu}",
            f"-iterations={_ITERATIONS}", "-resource-pressure=false", "-instruction-info=false",
            *([] if self._target.arch.startswith("x86") else [f"-mattr={self._attributes()}"]),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, input="\n".join(lines) + "\n", capture_output=True, text=True,
                timeout=_MCA_SECONDS, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        found = [int(n) / _ITERATIONS for n in _CYCLES.findall(done.stdout)]
        refused = "not a recognized processor" in done.stderr
        return None if done.returncode or refused or len(found) != len(regions) else found

    def _attributes(self) -> str:
        return ",".join(str(a) for a in self._target.tvm.attrs.get("mattr", []))


def function_lines(text: str, name: str) -> list[str]:
    """The lines of a function in assembly."""
    lines = text.splitlines()
    start = lines.index(f"{name}:") + 1
    end = next(i for i in range(start, len(lines)) if lines[i].startswith(".Lfunc_end"))
    return lines[start:end]


def loop_counts(kernel: Kernel) -> list[int]:
    """How often each loop of a kernel goes round, in the order in which they begin; the first is
    the one over the grid."""
    found: list[int] = []

    def visit(stmt: Any) -> None:
        if isinstance(stmt, tirx.For):
            extent = getattr(stmt.extent, "value", None)
            unknown = _UNKNOWN_ROUNDS if found else kernel.grid
            found.append(unknown if extent is None else int(extent))
        for inner in children(stmt):
            visit(inner)

    visit(kernel.func.body)
    return found


def loop_nest(lines: Sequence[str], counts: Sequence[int]) -> list[Loop]:
    """A function's loops with how often their instructions are run.

    Loops that the compiler has unrolled are missing, the innermost first: what is left takes the
    counts in order, and those of no loop multiply what is in the last one.
    """
    labels: dict[str, int] = {}
    instructions: list[tuple[int, str]] = []
    spans: list[tuple[int, int]] = []
    for at, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = at
        elif (found := _INSTRUCTION.fullmatch(line)) and not line.lstrip().startswith("."):
            target = _TARGET_OF_BRANCH.search(found[2])
            if target is None:
                instructions.append((at, line.strip()))
            elif target[1] in labels:
                spans.append((labels[target[1]], at))
    spans = sorted(set(spans), key=lambda span: (span[0], -span[1]))
    loops = []
    for first, last in spans:
        inside = [s for s in spans if s != (first, last) and first <= s[0] and s[1] <= last]
        around = [i for i, s in enumerate(spans) if s[0] <= first and last <= s[1]]
        own = tuple(
            text
            for at, text in instructions
            if first <= at <= last and not any(a <= at <= b for a, b in inside)
        )
        count = 1.0
        for i in around:
            count *= counts[i] if i < len(counts) else 1
        loops.append(Loop(own, count))
    return loops


def _llvm_mca() -> str | None:
    for name in ("llvm-mca", *(f"llvm-mca-{version}" for version in range(25, 13, -1))):
        if path := shutil.which(name):
            return path
    return None


def _cores(target: Target) -> list[str]:
    """Names of the core, the likeliest first: this machine's own where it runs the target."""
    import tvm

    named = str(target.tvm.attrs.get("mcpu", ""))
    found = []
    if runs_here(target.arch, target.requires):
        system = str(tvm.target.codegen.llvm_get_system_cpu())
        found += [system, *_OLDER.get(system, ())]
    return [name for name in (*found, named) if name and not name.startswith("generic")]


_OLDER: Mapping[str, tuple[str, ...]] = {
    "znver5": ("znver4", "znver3"), "znver4": ("znver3",),
    "sapphirerapids": ("icelake-server",), "emeraldrapids": ("icelake-server",),
    "graniterapids": ("icelake-server",), "alderlake": ("skylake",), "raptorlake": ("skylake",),
}  # fmt: skip
"""Those that an older llvm-mca knows instead of a core."""
