"""The C runtime under the compiler's sanitizers, which zig does not bring along."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from slmtvm.codegen.objects import write_object
from slmtvm.codegen.tables import kernel_symbol, write_tables
from slmtvm.codegen.weights import merge_weights
from slmtvm.plan.model import Plan
from slmtvm.target import Target
from tests.runtime.toy import toy_decoder, toy_encoder

ROOT = Path(__file__).parents[2]
RUNTIME = ROOT / "slmtvm" / "codegen" / "runtime"
PROGRAM = ROOT / "tests" / "runtime" / "hostile_calls.c"
CALLS = 5000


def build(plan: Plan, sanitizers: str, folder: Path) -> Path:
    """The program, the runtime and the toy's kernels in one, and the toy's bundle beside it."""
    target = Target.load("host")
    weights, (merged,) = merge_weights([plan])
    weights.write(folder / "weights.bin")
    (folder / "plan.c").write_text(write_tables(merged, target, weights))
    kernels = {kernel_symbol(n): merged.kernels[n].func for n in sorted(merged.kernels)}
    write_object(kernels, target, folder / "kernels.o")
    sources = [*map(str, sorted(RUNTIME.glob("*.c"))), str(folder / "plan.c"), str(PROGRAM)]
    result = subprocess.run(
        ["gcc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror",
         f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{RUNTIME}", *sources,
         str(folder / "kernels.o"), "-lm", "-pthread", "-o", str(folder / "run")],
        capture_output=True,
        text=True,
    )  # fmt: skip
    if "cannot find" in result.stderr:
        pytest.skip(f"gcc has no {sanitizers} sanitizer here")
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.mark.parametrize("mask", ["none", pytest.param("keys", marks=pytest.mark.slow), "skip"])
@pytest.mark.parametrize("toy", [toy_decoder, toy_encoder], ids=["decoder", "encoder"])
@pytest.mark.parametrize(
    "sanitizers", ["address,undefined", pytest.param("thread", marks=pytest.mark.slow)]
)
def test_random_calls_from_three_threads_leave_the_sanitizers_silent(
    toy: Callable[..., Plan], mask: str, sanitizers: str, tmp_path: Path
) -> None:
    if not shutil.which("gcc"):
        pytest.skip("no gcc here")
    program = build(toy(mask=mask), sanitizers, tmp_path)
    command = [str(program), str(tmp_path), "1", str(CALLS), "3"]
    if sanitizers == "thread" and shutil.which("setarch"):
        # ThreadSanitizer's shadow memory wants the address space as it was before more random bits.
        command = ["setarch", platform.machine(), "-R", *command]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout == "done\n"
