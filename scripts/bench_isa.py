#!/usr/bin/env python3
"""How much work a token is on CPUs that are not here: instructions executed, and cycles of loops.

    python scripts/bench_isa.py MODELS [--models demo tiny15] [--json FILE]

MODELS is a folder made by scripts/make_bench_models.py. For Arm (cortex-a78) and RISC-V (rvv, with
registers of 128 and 256 bits), in int4 and int8:

- the instructions that one decoded token executes under qemu-user, counted by a plugin, with ours
  and with llama.cpp, which is built from the source of llama-cpp-python for the same instructions;
- the instructions of linear kernels that skip zeros, over those of dense ones (--sparse alone does
  this and needs no MODELS);
- for cortex-a78, llvm-mca's cycles of the inner loops of linear kernels beside the bound that the
  core's ports give.

What it needs and what was measured: docs/benchmarks.md. The first run builds llama.cpp, which takes
long; --cache keeps it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from isa.loops import Loop, linear_kernels, measure_loops
from isa.programs import count_plugin, llama_program, slm_program
from isa.requirements import SYSROOTS, missing_models, missing_tools
from isa.sparse import PATTERNS, SparseCount, count_sparse, show_sparse

import slmtvm
from slmtvm.target import Target

MODELS = ("demo", "tiny15", "smol135")
PRECISIONS = ("int4", "int8")
CONTEXT = 1024
PROMPT, TOKENS = 16, 4  # how many are evaluated before, and while instructions are counted
CPUS = {
    "cortex-a78": {"": "max"},
    "riscv64-rvv": {
        f"vlen {vlen}": f"rv64,v=true,vlen={vlen},vext_spec=v1.0" for vlen in (128, 256)
    },
}
# llama.cpp with its weights repacked or not, flash attention on or off: the least counts.
LLAMA_SETTINGS = [(repack, flash) for repack in (1, 0) for flash in (1, 0)]
# LLVM gives cortex-a78 the ports of Cortex-A57, which loads once a cycle. Neoverse N1 has the two
# vector and two load pipes that the bound speaks of, in LLVM 17 and later.
LOOP_CPUS = {"cortex-a78": ("cortex-a78", "neoverse-n1")}
GOAL = 0.7  # of llama.cpp's instructions
LOOP_GOAL = 1.3  # of the port bound


@dataclass(frozen=True)
class Count:
    """Instructions of one decoded token."""

    model: str
    precision: str
    target: str
    cpu: str
    ours: int
    llama_cpp: int
    llama_cpp_settings: str

    @property
    def ratio(self) -> float:
        """Ours over llama.cpp's."""
        return self.ours / self.llama_cpp


def count(command: list[str], target: Target, cpu: str, plugin: Path) -> int:
    """Instructions of one of the TOKENS that ``command`` evaluates between its marks."""
    sysroot = str(SYSROOTS[target.arch])
    qemu = [f"qemu-{target.arch}", "-cpu", cpu, "-L", sysroot, "-plugin", str(plugin)]
    result = subprocess.run([*qemu, *command], capture_output=True, text=True)
    found = re.search(r"^instructions (\d+)$", result.stderr, re.MULTILINE)
    if result.returncode != 0 or not found:
        sys.exit(f"{' '.join(command)} failed under qemu:\n{result.stderr}")
    return round(int(found[1]) / TOKENS)


def count_model(
    folder: Path, precision: str, target: Target, cache: Path, scratch: Path
) -> list[Count]:
    """Ours and llama.cpp's, on each CPU that stands for ``target``."""
    bundle = scratch / f"{folder.name}-{precision}-{target.name}.slm"
    slmtvm.compile(folder / precision / "model.onnx", [target], output=bundle, context=CONTEXT)
    ours, llama = slm_program(bundle, target, scratch), llama_program(target, cache)
    plugin = count_plugin(target, scratch)
    size = [str(PROMPT), str(TOKENS)]
    rows = []
    for label, cpu in CPUS[target.name].items():
        mine = count([str(ours), str(bundle), *size], target, cpu, plugin)
        counts = {}
        for repack, flash in LLAMA_SETTINGS:
            settings = [str(repack), str(flash)]
            command = [str(llama), str(folder / f"{precision}.gguf"), *settings, *size]
            counts[f"repack {repack}, flash attention {flash}"] = count(
                command, target, cpu, plugin
            )
        best = min(counts, key=lambda name: counts[name])
        rows.append(Count(folder.name, precision, target.name, label, mine, counts[best], best))
    return rows


def show_counts(rows: list[Count]) -> str:
    """A line for each; what misses the goal is marked."""
    lines = [f"{'model':8} {'':5} {'target':22} {'ours':>12} {'llama.cpp':>12}  ratio"]
    for r in rows:
        missed = "" if r.ratio <= GOAL else f"  above {GOAL}"
        where = f"{r.target} {r.cpu}".strip()
        lines.append(
            f"{r.model:8} {r.precision:5} {where:22} {r.ours:>12,} {r.llama_cpp:>12,}  "
            f"{r.ratio:.2f}{missed}"
        )
    return "\n".join(lines)


def show_loops(rows: list[Loop]) -> str:
    """A line for each; what misses the goal is marked."""
    lines = ["dots, loads  all vector, loads  cycles (over the latter)"]
    for r in rows:
        cycles = ""
        for cpu, value in r.cycles.items():
            ratio = value / r.port_bound
            missed = "" if ratio <= LOOP_GOAL else f", above {LOOP_GOAL}"
            cycles += f"{cpu} {value:.1f} ({ratio:.2f}{missed})  "
        lines.append(f"{r.dot_bound:11.1f}  {r.port_bound:17.1f}  {cycles}{r.kernel}")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="MODELS", nargs="?")
    parser.add_argument("--sparse", action="store_true", help="count kernels with zeros alone")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["demo", "tiny15"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--targets", nargs="+", choices=CPUS, default=list(CPUS))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/slmtvm/bench-isa")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    options = parser.parse_args()
    if options.folder is None and not options.sparse:
        parser.error("MODELS is needed, but with --sparse")
    return options


def main() -> None:
    options = _arguments()
    targets = [Target.load(name) for name in options.targets]
    if lines := missing_tools([target.arch for target in targets], emulated=options.sparse):
        sys.exit("not found here; Debian has\n  " + "\n  ".join(lines))
    skipping = count_patterns(options.targets)
    if options.sparse:
        _write(options.json, [], [], skipping)
        return
    if paths := missing_models(options.folder, options.models, options.precisions):
        sys.exit(f"no {paths[0]}: make it with scripts/make_bench_models.py {options.folder}")
    counts: list[Count] = []
    loops: list[Loop] = []
    for target in targets:
        for model in options.models:
            for precision in options.precisions:
                with tempfile.TemporaryDirectory() as scratch:
                    rows = count_model(
                        options.folder / model, precision, target, options.cache, Path(scratch)
                    )
                counts += rows
                print(show_counts(rows), flush=True)
                if target.name in LOOP_CPUS:
                    onnx = options.folder / model / precision / "model.onnx"
                    cpus = LOOP_CPUS[target.name]
                    found = measure_loops(linear_kernels(onnx, target), target, cpus)
                    loops += found
                    print(show_loops(found), flush=True)
    _write(options.json, counts, loops, skipping)


def count_patterns(targets: Sequence[str]) -> list[SparseCount]:
    """Kernels that skip zeros, shown as they are counted."""
    wanted = [pattern for pattern in PATTERNS if pattern.target in targets]
    rows = [row for pattern in wanted for row in count_sparse(pattern, CPUS[pattern.target])]
    print(show_sparse(rows), flush=True)
    return rows


def _write(
    path: Path | None, counts: list[Count], loops: list[Loop], skipping: list[SparseCount]
) -> None:
    if path is None:
        return
    report = {
        "instructions": [{**asdict(r), "ratio": r.ratio} for r in counts],
        "loops": [asdict(r) for r in loops],
        "sparse": [{**asdict(r), "ratio": r.ratio} for r in skipping],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
