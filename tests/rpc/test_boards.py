"""Boards behind ssh and adb (``--exec "ssh board"``): they measure, and are left clean."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmtvm.bundle.write import write_bundle
from slmtvm.errors import RpcError
from slmtvm.rpc.client import Device
from slmtvm.rpc.device_bundle import DeviceBundle
from slmtvm.rpc.local import local_device
from slmtvm.rpc.target_check import check_target
from slmtvm.target import Target
from tests.rpc.boards import BOARDS
from tests.rpc.inputs import assert_a_job_gets_its_inputs
from tests.runtime.toy import toy_decoder

pytestmark = pytest.mark.slow
HOST = Target.load("host")
LIMITS = ("--memory", "300M", "--disk", "20M", "--timeout", "20")


@pytest.fixture(scope="module", params=BOARDS)
def command(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    with BOARDS[request.param](tmp_path_factory.mktemp("board")) as found:
        yield found


def _left() -> set[str]:
    return {name for name in os.listdir("/tmp") if name.startswith("slm-board-")}


@pytest.fixture(scope="module")
def board(command: str) -> Iterator[Device]:
    before = _left()
    with local_device("--exec", command, *LIMITS) as device:
        yield device
    deadline = time.monotonic() + 10
    while _left() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _left() - before  # nothing is left there


def test_a_job_on_a_board_has_its_arguments_input_and_files(board: Device, job: bytes) -> None:
    assert_a_job_gets_its_inputs(board, job, kilobytes=1250)


@pytest.mark.parametrize(("arguments", "status", "reason"), [
    (["status", "7"], 7, "ended with status 7: said before"),
    (["status", "255"], 255, "ended with status 255: said before"),
    (["crash"], -6, "ended with signal 6"),
    (["hunger"], 4, "ended with status 4: no memory"),
    (["flood"], None, "killed: it wrote more than 100,000 bytes to its standard output"),
])  # fmt: skip
def test_how_a_job_on_a_board_ends_is_told(
    arguments: list[str], status: int | None, reason: str, board: Device, job: bytes
) -> None:
    result = board.run(job, arguments, stdout_limit=100_000)
    assert result.status == status
    assert result.reason.startswith(reason)


def test_what_hangs_on_a_board_is_ended_there(board: Device, job: bytes) -> None:
    def running() -> int:
        found = 0
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    words = Path(entry.path, "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                found += words[0].startswith(b"./x-") and words[1:2] == [b"hang"]
        return found

    before = running()
    result = board.run(job, ["hang"], timeout_s=1.0)
    assert result.killed == "time"
    deadline = time.monotonic() + 10
    while running() > before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running() <= before
    assert board.run(job, ["again"]).stdout == b"again\n"


def test_a_board_says_what_it_is_and_runs_a_bundle(board: Device, tmp_path: Path) -> None:
    info = board.info()
    assert info["machine"] == platform.machine() and info["cores"] and info["features"]
    assert info["memory_bytes"] > 1 << 28
    check_target(board, HOST)
    write_bundle(tmp_path / "x.slm", [(HOST, toy_decoder())])
    assert DeviceBundle(board, tmp_path / "x.slm").info["kind"] == "decoder"


def test_no_link_that_a_job_makes_on_a_board_is_followed(
    board: Device, job: bytes, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"untouched")
    for name in ("linked.txt", "linked.txt.part"):
        assert board.run(job, ["link", str(victim), name]).ok
    result = board.run(job, ["cat", "linked.txt"], files={"linked.txt": b"sent"})
    assert result.stdout == b"sent"
    assert victim.read_bytes() == b"untouched"


def test_a_board_that_is_not_to_be_reached_is_said(tmp_path: Path, job: bytes) -> None:
    (tmp_path / "adb").write_text("#!/bin/sh\necho 'no devices/emulators found' >&2\nexit 1\n")
    (tmp_path / "adb").chmod(0o755)
    with (
        local_device("--exec", f"{tmp_path}/adb shell") as device,
        pytest.raises(RpcError, match=r"the board behind .*adb shell.*no devices/emulators found"),
    ):
        device.run(job, ["x"])


def test_a_user_is_refused_where_jobs_run_elsewhere() -> None:
    with (
        pytest.raises(RpcError, match="--user is for jobs on this machine"),
        local_device("--exec", "ssh board", "--user", "nobody"),
    ):
        pass


def test_a_lost_connection_is_no_fault_of_the_job(tmp_path: Path, job: bytes) -> None:
    folder = tmp_path / "adb"
    folder.write_text(
        '#!/bin/sh\nshift\ncase "$*" in *slm-status*) exit 255;; esac\nexec sh -c "$*"\n'
    )
    folder.chmod(0o755)
    with (
        local_device("--exec", f"{folder} shell") as device,
        pytest.raises(RpcError, match="the connection to the board was lost"),
    ):
        device.run(job, ["x"])
