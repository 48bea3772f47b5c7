"""Devices register, are given out one client at a time, and come back when things go away."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slmtvm.errors import RpcError
from slmtvm.rpc.client import devices, registered
from slmtvm.rpc.tracker import check_message
from tests.rpc.processes import ROOT, Runner, Tracker, running, wait_until_registered


def test_devices_of_a_key_are_given_out_one_client_at_a_time(tracker: Tracker, job: bytes) -> None:
    runners = [Runner("--tracker", tracker.address, "--key", "pair") for _ in range(2)]
    with running(*runners):
        wait_until_registered(tracker, "pair", 2)
        free = devices(tracker.address, "pair", wait_s=0.5)
        with next(free) as first, next(free) as second:
            assert first.address != second.address
            assert first.run(job, ["1"]).stdout == b"1\n"
            assert second.run(job, ["2"]).stdout == b"2\n"
            with pytest.raises(RpcError, match="no device 'pair' came free in time"):
                next(free)
        with next(devices(tracker.address, "pair")) as again:
            assert again.run(job).ok
    wait_until_registered(tracker, "pair", 0)
    with pytest.raises(RpcError, match="no device 'pair' is registered"):
        next(devices(tracker.address, "pair", wait_s=0.3))


def test_a_device_that_dies_is_an_error_and_the_next_one_serves(
    tracker: Tracker, job: bytes
) -> None:
    first = Runner("--tracker", tracker.address, "--key", "mortal")
    with running(first):
        wait_until_registered(tracker, "mortal")
        with next(devices(tracker.address, "mortal")) as device:
            first.end(signal.SIGKILL)
            with pytest.raises(RpcError, match=r"device 127\.0\.0\.1"):
                device.run(job)
        second = Runner("--tracker", tracker.address, "--key", "mortal")
        free = devices(tracker.address, "mortal", wait_s=30)
        with running(second), next(free) as device:
            assert device.run(job).ok


@pytest.mark.slow
def test_a_client_that_goes_without_a_word_frees_its_device(tracker: Tracker, job: bytes) -> None:
    code = (
        "import sys, time\nfrom slmtvm.without_torch import import_no_torch\n"
        "import_no_torch()\nfrom slmtvm.rpc.client import devices\n"
        f"device = next(devices({tracker.address!r}, 'left', wait_s=30))\n"
        "print('has it', flush=True)\ntime.sleep(600)\n"
    )
    with running(Runner("--tracker", tracker.address, "--key", "left")):
        client = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert client.stdout and client.stdout.readline() == "has it\n"
        client.kill()
        client.communicate()
        with next(devices(tracker.address, "left", wait_s=30)) as device:
            assert device.run(job).ok


@pytest.mark.slow
def test_runners_register_again_when_the_tracker_comes_back(job: bytes) -> None:
    tracker = Tracker()
    runner = Runner("--tracker", tracker.address, "--key", "loyal")
    with running(tracker, runner):
        wait_until_registered(tracker, "loyal")
        tracker.end(signal.SIGKILL)
        with pytest.raises(RpcError, match="cannot be reached"):
            registered(tracker.address)
        again = Tracker(tracker.port)  # the port is free: no child of the first one has it
        with running(again):
            wait_until_registered(again, "loyal")
            with next(devices(again.address, "loyal", wait_s=30)) as device:
                assert device.run(job).ok


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_tracker_and_a_runner_end_at_once_and_quietly(number: int) -> None:
    tracker = Tracker()
    runner = Runner("--tracker", tracker.address, "--key", "brief")
    with running(tracker, runner):
        wait_until_registered(tracker, "brief")
        start = time.monotonic()
        assert runner.end(number) == 128 + number
        assert tracker.end(number) == 128 + number
        assert time.monotonic() - start < 20
    assert "Traceback" not in "".join([*tracker.lines, *runner.lines])


def test_devices_are_listed(tracker: Tracker, runner: Runner) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "slmtvm.cli", "rpc", "devices", "--tracker", tracker.address],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"127.0.0.1:{runner.port}" in result.stdout
    assert "test: 1 registered, 1 free, 0 waited for" in result.stdout


_ALL = {1, 3, 4, 5, 6, 7}


@pytest.mark.parametrize("message", [
    [1], [6], [7], [4, "key", "", 1], [3, "key", [9000, "key:0.5"], None],
    [5, {"key": "server:key", "addr": [None, 9000]}],
])  # fmt: skip
def test_messages_as_stock_clients_and_runners_send_them_pass(message: object) -> None:
    check_message(message, _ALL)


@pytest.mark.parametrize("message", [
    None, [], {}, [True], ["6"], [2, "stop"], [3], [3, "key", [0, "key:1"], None],
    [3, "key", [9000, "other:1"], None], [3, "a b", [1, "a b:1"], None], [4, "key", "", "high"],
    [4, 5, "", 1], [5, {}], [5, {"key": "client:key", "addr": [None, 1]}], [1, 2],
])  # fmt: skip
def test_other_messages_do_not(message: object) -> None:
    with pytest.raises(ValueError, match=r"a message with code|a malformed message"):
        check_message(message, _ALL)


@pytest.mark.slow
def test_without_tornado_the_tracker_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "tornado.py").write_text("raise ImportError('not here')\n")
    result = subprocess.run(
        [sys.executable, "-m", "slmtvm.cli", "rpc", "tracker", "--port", "0"],
        cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert result.returncode == 1
    assert "TVM's tracker needs tornado: pip install 'slmtvm[rpc]'" in result.stderr


@pytest.mark.slow
def test_twenty_devices_serve_thirty_clients_each_one_at_a_time(
    tracker: Tracker, job: bytes
) -> None:
    runners = [Runner("--tracker", tracker.address, "--key", "farm") for _ in range(20)]
    busy: set[str] = set()
    served: list[str] = []
    lock = threading.Lock()

    def client(number: int) -> None:
        with next(devices(tracker.address, "farm")) as device:
            with lock:
                assert device.address not in busy
                busy.add(device.address)
            assert device.run(job, [str(number)]).stdout == b"%d\n" % number
            with lock:
                busy.remove(device.address)
                served.append(device.address)

    with running(*runners):
        wait_until_registered(tracker, "farm", 20)
        with ThreadPoolExecutor(30) as pool:
            list(pool.map(client, range(30)))
    assert len(served) == 30 and len(set(served)) == 20
