"""The archive for a board: what is in it starts, registers and measures."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from slmtvm.rpc import slm_runner
from slmtvm.rpc.client import devices
from slmtvm.rpc.keygen import keygen
from slmtvm.rpc.pack import pack_runner
from slmtvm.target import Target
from tests.rpc.processes import ROOT, Process, Tracker, running, wait_until_registered

MEGABYTE = 1 << 20


@pytest.mark.slow
def test_a_packed_runner_is_small_and_measures(
    tracker: Tracker, job: bytes, tmp_path: Path
) -> None:
    archive = tmp_path / "runner.tar.gz"
    result = subprocess.run(
        [sys.executable, "-m", "slmtvm.cli", "runner", "pack", "--target", "host", "-o", archive],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert archive.stat().st_size < MEGABYTE
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    folder = tmp_path / "slm-runner"
    assert sum(path.stat().st_size for path in folder.rglob("*")) < MEGABYTE
    runner = Process([str(folder / "run"), "--tracker", tracker.address, "--key", "packed"])
    with running(runner):
        wait_until_registered(tracker, "packed")
        with next(devices(tracker.address, "packed", wait_s=30)) as device:
            assert device.run(job, ["well"]).stdout == b"well\n"


@pytest.mark.slow
def test_equal_arguments_give_equal_archives_and_keys_make_one_a_secret(tmp_path: Path) -> None:
    target = Target.load("host")
    for name in ("one", "two"):
        pack_runner(target, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    keygen(tmp_path / "keys")
    pack_runner(target, tmp_path / "secret", keys=tmp_path / "keys")
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    with tarfile.open(tmp_path / "secret") as opened:
        names = opened.getnames()
    assert "slm-runner/keys/key.pem" in names
    assert not any("ca.key" in name for name in names)


def test_the_runner_needs_nothing_but_python_3_8() -> None:
    source = Path(slm_runner.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    modules = {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules <= sys.stdlib_module_names | {"collections.abc"}


def test_a_waiting_runner_takes_little_memory(tracker: Tracker) -> None:
    command = [sys.executable, "-S", slm_runner.__file__, "--tracker", tracker.address]
    runner = Process([*command, "--key", "small"])
    with running(runner):
        wait_until_registered(tracker, "small")
        status = Path(f"/proc/{runner.process.pid}/status").read_text()
        (resident,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
        assert int(resident.split()[1]) * 1024 < 15 * MEGABYTE
