"""What a setting costs by its code alone, without a device: a first pass, and a filter.

Each basic block of a kernel's assembly is run as often as the marks of ``frequency`` say. Its
instructions take the cycles that llvm-mca says of the target's core in a steady state, or where it
is missing or does not know the core, one each. Weights come from memory as fast as the target says
that a core reads. Caches and latencies are not seen: kernels of one row are bound by memory, and
their order is little more than a guess.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from slmtvm.codegen.objects import build_module
from slmtvm.host import runs_here
from slmtvm.schedules import isa as isas
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from slmtvm.tuning.frequency import Block, blocks, marked
from slmtvm.tuning.tasks import TaskKey

INSTRUCTIONS = "instructions"
"""How costs were found where llvm-mca was not asked."""
_CYCLES = re.compile(r"Total Cycles:\s+(\d+)")
_ITERATIONS = 20
_MCA_SECONDS = 120.0
_CLOCK = 3e9  # Hz, of no particular core: cycles are compared with a target's bytes a second
_READ_GB_PER_SECOND = 10.0  # of a core, where the target does not say


class StaticModel:
    """Costs of kernels for ``target``; ``by`` says how they are found: "llvm-mca CPU" or
    "instructions"."""

    def __init__(self, target: Target) -> None:
        self._target, self._isa = target, isas.get(target.isa)
        self._program, self._cpu = _llvm_mca(), ""
        if self._program:
            self._cpu = next((c for c in _cores(target) if self._knows(c)), "")
        read = target.read_gb_per_second or _READ_GB_PER_SECOND
        self._bytes_a_cycle = read * 1e9 / _CLOCK
        self.by = f"llvm-mca {self._cpu}" if self._cpu else INSTRUCTIONS

    def costs(self, key: TaskKey, settings: Sequence[Knobs]) -> list[float]:
        """Of each setting: cycles of a whole call, or instructions."""
        template = TEMPLATES[key.kind]
        kernels = [template.build(key.shape, self._isa, knobs) for knobs in settings]
        comment = "//" if self._target.arch == "aarch64" else "#"
        functions = {f"candidate_{i}": marked(k, comment) for i, k in enumerate(kernels)}
        module = build_module({name: m.func for name, m in functions.items()}, self._target)
        text = module.inspect_source("asm")
        found = [
            blocks(function_lines(text, name), m.runs, m.streamed) for name, m in functions.items()
        ]
        code = [b.instructions for each in found for b in each]
        cycles = self._mca(code, self._cpu) if self._cpu else None
        left = iter(cycles if cycles is not None else map(float, map(len, code)))
        return [
            self._cost(each, [next(left) for _ in each], knobs.get("pf", 0) > 0)
            for each, knobs in zip(found, settings, strict=True)
        ]

    def _cost(self, parts: Sequence[Block], cycles: Sequence[float], prefetched: bool) -> float:
        """Of a call: what its blocks compute or wait for. Weights that are prefetched come while
        anything is computed, others only while the block that reads them is."""
        computing = [block.count * each for block, each in zip(parts, cycles, strict=True)]
        reading = [block.streamed / self._bytes_a_cycle for block in parts]
        if prefetched:
            return max(sum(computing), sum(reading))
        return sum(map(max, computing, reading))

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
