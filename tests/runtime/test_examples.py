"""The C example, built as its comment says, on this machine and under emulation."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from slmtvm.bundle.write import write_bundle
from slmtvm.codegen.zig import zig_cc
from slmtvm.target import Target, known_targets
from tests.emulation.session import CPUS, SYSROOTS
from tests.runtime.toy import CONTEXT, decoder_reference, toy_decoder, toy_weights

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "c" / "generate.c"
MAX_LINES = 60
PROMPT = [3, 14, 15, 92, 65, 35]
# CPUs that lack what a target needs, and what they lack.
TOO_OLD = {"cortex-a78": ("cortex-a72", "asimddp"), "riscv64-rvv": ("rv64", "rvv")}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("example") / "toy.slm"
    write_bundle(path, [(Target.load(name), toy_decoder()) for name in known_targets()])
    return path


def greedy(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(decoder_reference(tokens, toy_weights())[-1])))
    return tokens[len(prompt) :]


def build(bundle: Path, target: Target) -> Path:
    program = bundle.parent / f"generate-{target.name}"
    if not program.exists():
        library = bundle / "lib" / f"{target.name}.so"
        zig_cc(
            target.link,
            ["-O2", f"-I{ROOT}/slmtvm/codegen/runtime", "-o", str(program), str(EXAMPLE),
             str(library), f"-Wl,-rpath,{library.parent}", "-pthread"],
        )  # fmt: skip
    return program


def emulator(target: Target, cpu: str) -> list[str]:
    qemu, sysroot = f"qemu-{target.arch}-static", Path(SYSROOTS[target.arch])
    if not shutil.which(qemu):
        pytest.skip(f"no {qemu} here")
    if not sysroot.is_dir():
        pytest.skip(f"no C library for {target.arch} in {sysroot}")
    return [qemu, "-cpu", cpu, "-L", str(sysroot)]


def machines() -> list[tuple[str, str | None]]:
    """Each target with each CPU it is tried on; None is this machine."""
    found: list[tuple[str, str | None]] = []
    for name in known_targets():
        arch = Target.load(name).arch
        cpus = CPUS.get(arch, ()) if arch != platform.machine() else (None,)
        found += [(name, cpu) for cpu in cpus]
    return [*found, ("cortex-a72", "cortex-a72")]


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= MAX_LINES


@pytest.mark.slow
def test_the_documented_command_builds_it(bundle: Path, tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler here")
    target = Target.load("host")
    shutil.copytree(bundle, tmp_path / "demo.slm")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "slmtvm").symlink_to(ROOT / "slmtvm")
    comment = EXAMPLE.read_text().split("*/")[0]
    command = comment[comment.index(" cc ") :].replace("\n *", "\n").replace("TARGET", target.name)
    subprocess.run(command.strip(), shell=True, cwd=tmp_path, check=True)
    result = subprocess.run(
        [tmp_path / "generate", tmp_path / "demo.slm", "3", "0", *map(str, PROMPT)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert list(map(int, result.stdout.split())) == greedy(PROMPT, 3)


@pytest.mark.parametrize(("name", "cpu"), machines())
def test_it_generates_what_the_reference_does_on_every_target(
    bundle: Path, name: str, cpu: str | None
) -> None:
    target = Target.load(name)
    prefix = emulator(target, cpu) if cpu else []
    command = [*prefix, str(build(bundle, target)), str(bundle)]
    result = subprocess.run(
        [*command, "12", "0", *map(str, PROMPT)], capture_output=True, text=True, timeout=60
    )
    if not prefix and "this CPU lacks" in result.stderr:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr
    assert list(map(int, result.stdout.split())) == greedy(PROMPT, 12)


@pytest.mark.parametrize("name", TOO_OLD)
def test_a_cpu_without_the_needed_feature_gets_a_message(bundle: Path, name: str) -> None:
    target = Target.load(name)
    if target.arch == platform.machine():
        pytest.skip(f"{target.arch} is not emulated here")
    cpu, lacking = TOO_OLD[name]
    result = subprocess.run(
        [*emulator(target, cpu), str(build(bundle, target)), str(bundle), "1", "0", "1"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 1
    assert f"this CPU lacks {lacking}, which the library for {name} needs" in result.stderr


def test_the_prompt_may_come_from_standard_input(bundle: Path) -> None:
    program = build(bundle, Target.load("host"))
    result = subprocess.run(
        [program, bundle, "5", "0"], input=" ".join(map(str, PROMPT)), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert list(map(int, result.stdout.split())) == greedy(PROMPT, 5)


@pytest.mark.parametrize(
    ("bundle_name", "tokens", "message"),
    [
        ("toy.slm", ["101"], "token 0 is 101, must be 0 to 100"),
        ("toy.slm", ["1"] * (CONTEXT + 5), "do not fit the context of 50"),
        ("none.slm", ["1"], "none.slm/weights.bin: cannot open: No such file"),
    ],
)
def test_a_mistake_ends_it_with_a_message(
    bundle: Path, bundle_name: str, tokens: list[str], message: str
) -> None:
    program = build(bundle, Target.load("host"))
    result = subprocess.run(
        [program, bundle.parent / bundle_name, "1", "0", *tokens], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert message in result.stderr
