"""slm-selftest says whether a device computes what was computed where the model was compiled."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from slmtvm.bundle import Bundle
from slmtvm.codegen.program import build_program
from tests.codegen.elf import Elf
from tests.packaging.conftest import Keys, Release
from tests.packaging.devices import DEVICES, HOST, emulator
from tests.runtime.toy import toy_weights

MAX_PROGRAM_BYTES = 160 << 10


@pytest.fixture(scope="session")
def program(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs") / "slm-selftest"
    build_program(Bundle.open(release.bundle(1)), HOST, "selftest", path)
    return path


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("target", DEVICES)
def test_a_device_computes_what_was_recorded(
    target: str, release: Release, keys: Keys, tmp_path: Path
) -> None:
    path = tmp_path / "slm-selftest"
    build_program(Bundle.open(release.bundle(1)), target, "selftest", path)
    assert path.stat().st_size < MAX_PROGRAM_BYTES
    program = Elf(path.read_bytes())
    assert not program.has_section(".interp") and not program.has_section(".dynamic")
    result = run(
        *emulator(target), path, release.bundle(1), "--keys", keys.public, "--threads", "2",
        "--seconds", "0.01",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("same: 37 tokens, ")][::2]
    assert sum(line.startswith("speed: ") for line in lines) == 2
    assert lines[-1] == "ok"


def test_a_result_that_was_not_recorded_is_a_failure(
    program: Path, release: Release, tmp_path: Path
) -> None:
    bundle = shutil.copytree(release.bundle(1), tmp_path / "x.slm")
    manifest = json.loads((bundle / "manifest.json").read_text())
    selftest = manifest["targets"][HOST]["selftest"]
    selftest["tokens"][20] = (selftest["tokens"][20] + 1) % 101
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    result = run(program, bundle)
    assert result.returncode == 1
    assert result.stdout.splitlines() == [
        "DIFFERENT: 37 tokens, 37 at a time, 1 threads", "FAILED",
    ]  # fmt: skip


def test_what_is_recorded_changes_with_one_number_of_the_weights(release: Release) -> None:
    assert toy_weights(1)["bias"].any()
    one, two = (Bundle.open(release.bundle(n)).manifest.targets[HOST].selftest for n in (1, 2))
    assert one is not None and two is not None
    assert one["tokens"] == two["tokens"] and one["sha256"] != two["sha256"]


def test_a_bundle_that_cannot_be_trusted_is_not_tried(
    program: Path, release: Release, other_keys: Keys, keys: Keys
) -> None:
    for words, message in (
        (["--keys", other_keys.public], "signed by no public key that is trusted"),
        (["--keys", keys.public, "--least-counter", "2"], "counter is 1, older than the least"),
        (["--keys", "/dev/null"], "cannot be read"),
    ):
        result = run(program, release.bundle(1), *words)
        assert result.returncode == 2 and message in result.stderr


@pytest.mark.parametrize("text", [b"", b"{}", b"[", b'{"targets": {}}', b"\0" * 99, b"[" * 9999])
def test_any_manifest_is_answered_with_an_error(
    text: bytes, program: Path, release: Release, tmp_path: Path
) -> None:
    bundle = shutil.copytree(release.bundle(1), tmp_path / "x.slm")
    (bundle / "manifest.json").write_bytes(text)
    result = run(program, bundle)
    assert result.returncode == 2 and "manifest.json" in result.stderr


@pytest.mark.parametrize("words", [[], ["--help"], ["x", "--threads"], ["x", "--threads", "two"]])
def test_wrong_usage_is_said(words: list[str], program: Path) -> None:
    result = run(program, *words)
    assert result.returncode == 64 and result.stderr.startswith("usage: slm-selftest BUNDLE")


def test_a_cpu_without_a_feature_is_told_so(release: Release, tmp_path: Path) -> None:
    path = tmp_path / "slm-selftest"
    build_program(Bundle.open(release.bundle(1)), "cortex-a78", "selftest", path)
    command = emulator("cortex-a78")
    if not command:
        pytest.skip("this machine is an Arm one: no emulator chooses its features")
    result = run(command[0], "-cpu", "cortex-a72", path, release.bundle(1))
    assert result.returncode == 2 and "this CPU lacks asimddp" in result.stderr
