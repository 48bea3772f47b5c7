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
PROGRAMS = ROOT / "tests" / "runtime"
CALLS = 5000
ROUNDS = 60
MANIFESTS = 5000


def build(plan: Plan, sanitizers: str, folder: Path, program: str, *, delays: bool = False) -> Path:
    """The program, the runtime and the toy's kernels in one, and the toy's bundle beside it.

    With ``delays`` the program says which parts of a step take long, and which cores there are.
    """
    if not shutil.which("gcc"):
        pytest.skip("no gcc here; on Debian and Ubuntu: apt install gcc libc6-dev")
    target = Target.load("host")
    weights, (merged,) = merge_weights([plan])
    weights.write(folder / "weights.bin")
    (folder / "plan.c").write_text(write_tables(merged, target, weights))
    kernels = {kernel_symbol(n): merged.kernels[n].func for n in sorted(merged.kernels)}
    write_object(kernels, target, folder / "kernels.o")
    runtime = [c for c in sorted(RUNTIME.glob("*.c")) if not (delays and c.name == "cores.c")]
    sources = [*map(str, runtime), str(folder / "plan.c"), str(PROGRAMS / program)]
    # gcc warns that ThreadSanitizer knows no fences; what the pool's fence orders is no data.
    flags = ["-Wno-tsan"] if sanitizers == "thread" else []
    if delays:
        flags += ["-include", str(PROGRAMS / "delay.h")]
    result = subprocess.run(
        ["gcc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror",
         f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{RUNTIME}", *flags, *sources,
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
    program = build(toy(mask=mask), sanitizers, tmp_path, "hostile_calls.c")
    run([str(program), str(tmp_path), "1", str(CALLS), "3"], sanitizers)


@pytest.mark.parametrize("mixed", ["0", "1"], ids=["equal cores", "mixed cores"])
@pytest.mark.parametrize(
    "sanitizers", ["address,undefined", pytest.param("thread", marks=pytest.mark.slow)]
)
def test_one_to_eight_threads_give_the_same_bits_whichever_of_them_is_held_up(
    sanitizers: str, mixed: str, tmp_path: Path
) -> None:
    program = build(toy_decoder(), sanitizers, tmp_path, "equal_threads.c", delays=True)
    run([str(program), str(tmp_path), "1", str(ROUNDS), mixed], sanitizers)


def test_random_manifests_and_keys_leave_the_sanitizers_silent(tmp_path: Path) -> None:
    program = build(toy_decoder(), "address,undefined", tmp_path, "hostile_manifests.c")
    run([str(program), str(tmp_path), "1", str(MANIFESTS)], "address,undefined")


def run(command: list[str], sanitizers: str) -> None:
    if sanitizers == "thread" and shutil.which("setarch"):
        # ThreadSanitizer's shadow memory wants the address space as it was before more random bits.
        command = ["setarch", platform.machine(), "-R", *command]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout == "done\n"
