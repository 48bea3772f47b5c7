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
from tests.codegen.sanitized import DELAY, gcc, objects
from tests.runtime.toy import toy_decoder, toy_encoder

PROGRAMS = Path(__file__).parents[1] / "runtime"
CALLS = 5000
ROUNDS = 60
MANIFESTS = 5000


Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """``build(plan, sanitizers, program)``: the program, the runtime and the toy's kernels in one,
    and the toy's bundle beside it."""

    def build(plan: Plan, sanitizers: str, program: str, *, delays: bool = False) -> Path:
        runtime = objects(tmp_path_factory, sanitizers, "runtime", delays=delays)
        target = Target.load("host")
        weights, (merged,) = merge_weights([plan])
        weights.write(tmp_path / "weights.bin")
        (tmp_path / "plan.c").write_text(write_tables(merged, target, weights))
        kernels = {kernel_symbol(n): merged.kernels[n].func for n in sorted(merged.kernels)}
        write_object(kernels, target, tmp_path / "kernels.o")
        included = ["-include", str(DELAY)] if delays else []
        linked = ["plan.c", str(PROGRAMS / program), *runtime, "kernels.o", "-lm", "-pthread"]
        gcc(sanitizers, [*included, *linked, "-o", "run"], tmp_path)
        return tmp_path / "run"

    return build


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["none", pytest.param("keys", marks=pytest.mark.slow), "skip"])
@pytest.mark.parametrize("toy", [toy_decoder, toy_encoder], ids=["decoder", "encoder"])
@pytest.mark.parametrize(
    "sanitizers", ["address,undefined", pytest.param("thread", marks=pytest.mark.slow)]
)
def test_random_calls_from_three_threads_leave_the_sanitizers_silent(
    toy: Callable[..., Plan], mask: str, sanitizers: str, build: Build, tmp_path: Path
) -> None:
    program = build(toy(mask=mask), sanitizers, "hostile_calls.c")
    run([str(program), str(tmp_path), "1", str(CALLS), "3"], sanitizers)


@pytest.mark.slow
@pytest.mark.parametrize("mixed", ["0", "1"], ids=["equal cores", "mixed cores"])
@pytest.mark.parametrize(
    "sanitizers", ["address,undefined", pytest.param("thread", marks=pytest.mark.slow)]
)
def test_one_to_eight_threads_give_the_same_bits_whichever_of_them_is_held_up(
    sanitizers: str, mixed: str, build: Build, tmp_path: Path
) -> None:
    program = build(toy_decoder(), sanitizers, "equal_threads.c", delays=True)
    run([str(program), str(tmp_path), "1", str(ROUNDS), mixed], sanitizers)


@pytest.mark.slow
def test_random_manifests_and_keys_leave_the_sanitizers_silent(
    build: Build, tmp_path: Path
) -> None:
    program = build(toy_decoder(), "address,undefined", "hostile_manifests.c")
    run([str(program), str(tmp_path), "1", str(MANIFESTS)], "address,undefined")


def run(command: list[str], sanitizers: str) -> None:
    if sanitizers == "thread" and shutil.which("setarch"):
        # ThreadSanitizer's shadow memory wants the address space as it was before more random bits.
        command = ["setarch", platform.machine(), "-R", *command]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout == "done\n"
