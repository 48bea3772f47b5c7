"""Inner loops of linear kernels: found in assembly, timed by llvm-mca, beside their port bound."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slmtvm.codegen.objects import build_module
from slmtvm.importer import import_onnx
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.plan.model import KernelCode
from slmtvm.target import Target

ITERATIONS = 200
# Cortex-A78 Core Software Optimization Guide: two pipes for vector arithmetic (sdot among it), and
# as the bound asks, two loads of 16 bytes a cycle.
VECTOR_PIPES = LOAD_PIPES = 2
_DOT = "sdot"
_LABEL = re.compile(r"^(\.?\w+):")
_BRANCH = re.compile(r"^\t(?:b\.\w+|cbn?z|tbn?z)\t.*?(\.LBB\w+)$")
_INSTRUCTION = re.compile(r"^\t[a-z]")
_VECTOR_OPERAND = re.compile(r"\bv\d+\.")


@dataclass(frozen=True)
class Loop:
    """Cycles of one iteration: ``cycles`` by llvm-mca, for each CPU; what the ports allow, for the
    dot products and loads alone, and for all vector instructions and loads."""

    kernel: str
    dots: int
    cycles: dict[str, float]
    dot_bound: float
    port_bound: float


def linear_kernels(model: Path, target: Target) -> dict[str, KernelCode]:
    """The linear kernels that ``model`` is compiled to."""
    plan = build_plan(lower(fuse(import_onnx(model, context=1024)), target), {})
    return {n: k for n, k in plan.kernels.items() if n.startswith("linear_") and "_f32_" not in n}


def measure_loops(
    kernels: Mapping[str, KernelCode], target: Target, cpus: Sequence[str]
) -> list[Loop]:
    """The hottest loop of each kernel, timed for each of ``cpus``."""
    functions = {name: code.func for name, code in kernels.items()}
    assembly = build_module(functions, target).inspect_source("s").splitlines()
    loops = []
    for name in kernels:
        body = hottest_loop(_function(assembly, name))
        triple = str(target.llvm["mtriple"])
        cycles = {cpu: _cycles(body, triple, cpu) for cpu in cpus}
        loops.append(Loop(name, sum(map(_is_dot, body)), cycles, *port_bounds(body)))
    return loops


def _function(assembly: list[str], name: str) -> list[str]:
    start = assembly.index(f"{name}:")
    end = next(i for i in range(start, len(assembly)) if ".cfi_endproc" in assembly[i])
    return assembly[start:end]


def hottest_loop(function: list[str]) -> list[str]:
    """The instructions of the innermost loop with the most dot products."""
    labels = {m[1]: i for i, line in enumerate(function) if (m := _LABEL.match(line))}
    loops: list[range] = []
    for end, line in enumerate(function):
        branch = _BRANCH.match(line)
        if branch and (start := labels.get(branch[1], end)) < end:
            loops.append(range(start, end + 1))

    def holds_another(loop: range) -> bool:
        return any(b is not loop and b[0] in loop and b[-1] in loop for b in loops)

    innermost = [loop for loop in loops if not holds_another(loop)]
    bodies = [[function[i] for i in a if _INSTRUCTION.match(function[i])] for a in innermost]
    return max(bodies, key=lambda body: (sum(map(_is_dot, body)), -len(body)))


def port_bounds(body: list[str]) -> tuple[float, float]:
    """Cycles that ports ask for: dot products and loads only; all vector arithmetic and loads."""
    loads = sum(_loads(line) for line in body)
    vector = sum(_is_arithmetic(line) for line in body)
    dots = sum(map(_is_dot, body))
    by_loads = loads / LOAD_PIPES
    return max(dots / VECTOR_PIPES, by_loads), max(vector / VECTOR_PIPES, by_loads)


def _is_dot(line: str) -> bool:
    return line.startswith(f"\t{_DOT}\t")


def _loads(line: str) -> int:
    mnemonic = line.split()[0]
    if not mnemonic.startswith("ld"):
        return 0
    return 2 if mnemonic.startswith("ldp") else 1


def _is_arithmetic(line: str) -> bool:
    return _VECTOR_OPERAND.search(line) is not None and not line.startswith(("\tld", "\tst"))


def llvm_mca() -> str:
    """The newest llvm-mca that is installed: older ones lack the ports of newer cores."""
    versioned = [f"llvm-mca-{version}" for version in range(40, 13, -1)]
    return next((name for name in versioned if shutil.which(name)), "llvm-mca")


def _cycles(body: list[str], triple: str, cpu: str) -> float:
    with tempfile.NamedTemporaryFile("w", suffix=".s") as file:
        file.write("\n".join(body) + "\n")
        file.flush()
        command = [llvm_mca(), f"-mtriple={triple}", f"-mcpu={cpu}", f"-iterations={ITERATIONS}"]
        result = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
    found = re.search(r"Total Cycles:\s+(\d+)", result.stdout)
    assert found, result.stdout
    return int(found[1]) / ITERATIONS
