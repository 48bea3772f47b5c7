"""Programs run on a device: their results, their limits, and what is left behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from slmtvm.errors import RpcError, TargetError
from slmtvm.rpc.client import Device
from slmtvm.rpc.local import local_device, own_runner
from slmtvm.rpc.target_check import check_target
from slmtvm.target import Target
from tests.machines import is_native
from tests.rpc.inputs import assert_a_job_gets_its_inputs


def test_a_job_gets_arguments_input_and_files_and_gives_its_output(
    device: Device, job: bytes
) -> None:
    assert_a_job_gets_its_inputs(device, job, kilobytes=2500)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "status", "reason"), [
    (["status", "7"], 7, "ended with status 7: said before"),
    (["crash"], -6, "ended with signal 6"),
    (["hang"], None, r"killed after 0\.5 s"),
    (["leave"], None, r"killed after 0\.5 s"),
    (["hunger"], 4, "ended with status 4: no memory"),
    (["flood"], None, "killed: it wrote more than 100,000 bytes to its standard output"),
])  # fmt: skip
def test_how_a_job_ends_is_told_and_the_session_goes_on(
    arguments: list[str], status: int | None, reason: str, device: Device, job: bytes
) -> None:
    result = device.run(job, arguments, timeout_s=0.5, stdout_limit=100_000)
    assert result.status == status
    assert not result.ok
    assert reason.replace("\\", "") in result.reason
    assert len(result.stdout) <= 100_000
    assert device.run(job, ["still", "there"]).ok


def test_a_job_that_fills_the_disk_is_ended_and_its_files_go(device: Device, job: bytes) -> None:
    result = device.run(job, ["fill"], timeout_s=20)
    assert result.killed == "it wrote more than 20,971,520 bytes"
    assert not device.run(job, ["cat", "file0"]).ok


def test_a_link_that_a_job_makes_leads_no_upload_out_of_the_folder(
    device: Device, job: bytes, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    assert device.run(job, ["link", str(outside), "link.txt"]).ok
    assert device.run(job, ["cat", "link.txt"], files={"link.txt": b"mine"}).stdout == b"mine"
    assert outside.read_text() == "untouched"


def test_a_job_knows_nothing_of_the_environment_of_its_runner(
    job: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "x")
    with local_device() as device:
        result = device.run(job, ["cat", "/proc/self/environ"])
    assert b"HOME=" in result.stdout
    assert b"A_SECRET" not in result.stdout


def test_a_session_leaves_no_file_and_no_process(job: bytes, tmp_path: Path) -> None:
    with local_device("--folder", str(tmp_path)) as device:
        device.run(job, ["leave"], timeout_s=0.2)
        (folder,) = tmp_path.iterdir()
    assert not folder.exists()
    for process in Path("/proc").glob("[0-9]*/cwd"):
        try:
            assert not os.readlink(process).startswith(str(tmp_path))
        except OSError:
            continue


def test_what_a_killed_runner_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    left = tmp_path / "slm-runner-999999999-abc"
    left.mkdir()
    (left / "x").write_text("")
    (tmp_path / "other").mkdir()
    with own_runner(["--folder", str(tmp_path)]):
        assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_jobs_run_on_the_cores_that_the_runner_was_given(job: bytes) -> None:
    core = max(os.sched_getaffinity(0))
    with local_device("--cores", str(core)) as device:
        assert device.info()["cores"] == [core]
        status = device.run(job, ["cat", "/proc/self/status"]).stdout.decode()
    assert f"Cpus_allowed_list:\t{core}\n" in status


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run jobs as another user")
def test_jobs_run_as_another_user_where_the_runner_is_root(job: bytes) -> None:
    with local_device("--user", "nobody", "--folder", tempfile.gettempdir()) as device:
        status = device.run(job, ["cat", "/proc/self/status"]).stdout.decode()
        assert "Uid:\t65534\t65534\t65534\t65534" in status
        assert not device.run(job, ["cat", "/etc/shadow"]).ok


def test_what_a_device_tells_of_itself_is_what_linux_tells(device: Device) -> None:
    info = device.info()
    cpuinfo = Path("/proc/cpuinfo").read_text()
    assert info["model"] in cpuinfo
    assert set(info["features"]) <= set(cpuinfo.split())
    assert info["memory_bytes"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert info["job_memory_bytes"] == 300 << 20
    assert info["cores"] == sorted(os.sched_getaffinity(0))


def test_a_target_that_the_device_cannot_run_is_refused(device: Device) -> None:
    check_target(device, Target.load("host"))
    foreign = next(t for t in ("cortex-a72", "riscv64-rvv") if not is_native(Target.load(t)))
    with pytest.raises(TargetError, match=rf"the target {foreign} is (aarch64|riscv64)"):
        check_target(device, Target.load(foreign))


def test_a_device_that_was_given_back_refuses(job: bytes) -> None:
    with local_device() as device:
        pass
    with pytest.raises(RpcError, match="was given back already"):
        device.run(job)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "said"), [
    (["--cores", "4-"], "not a list of cores"),
    (["--memory", "lots"], "not a size"),
    (["--key", "a b"], "not a key"),
    (["--tls", "/nowhere"], "no ca.pem, cert.pem and key.pem"),
    (["--user", "no-such-user"], "there is no user|needs a runner that is root"),
    (["--host", "192.0.2.1"], "Cannot assign requested address"),
])  # fmt: skip
def test_a_runner_that_cannot_start_says_why(options: list[str], said: str) -> None:
    with pytest.raises(RpcError, match=said), own_runner(options):
        pass
