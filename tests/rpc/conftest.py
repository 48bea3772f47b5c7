"""Programs for this machine, and one tracker with one runner, once for a test process."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from slmtvm.codegen.c_runtime import C_FLAGS, runtime_object
from slmtvm.codegen.zig import zig_cc
from slmtvm.rpc.client import Device
from slmtvm.rpc.local import local_device
from tests.rpc.processes import Runner, Tracker, running, wait_until_registered

HERE = Path(__file__).parent
TRIPLE = f"{platform.machine()}-linux-musl"


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The executable of kernels.c."""
    folder = tmp_path_factory.mktemp("kernels")
    sources = Path(str(resources.files("slmtvm.codegen") / "runtime"))
    child = Path(str(resources.files("slmtvm.rpc") / "child"))
    runtime = runtime_object(TRIPLE, sources, folder)
    zig_cc(
        TRIPLE,
        [*C_FLAGS, f"-I{sources}", f"-I{child}", str(HERE / "kernels.c"), str(child / "main.c"),
         str(runtime), "-static", "-s", "-Wl,--gc-sections", "-o", "kernels"],
        folder=folder,
    )  # fmt: skip
    return folder / "kernels"


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The executable of job.c."""
    folder = tmp_path_factory.mktemp("job")
    zig_cc(TRIPLE, ["-O1", "-static", "-s", str(HERE / "job.c"), "-o", "job"], folder=folder)
    return (folder / "job").read_bytes()


@pytest.fixture(scope="session")
def tracker() -> Iterator[Tracker]:
    tracker = Tracker()
    with running(tracker):
        yield tracker


@pytest.fixture(scope="session")
def runner(tracker: Tracker) -> Iterator[Runner]:
    """Registered with ``tracker`` as "test", with little memory and disk."""
    limits = ("--memory", "300M", "--disk", "20M", "--timeout", "20")
    runner = Runner("--tracker", tracker.address, "--key", "test", *limits)
    with running(runner):
        wait_until_registered(tracker, "test")
        yield runner
        assert runner.alive


@pytest.fixture
def remote(tracker: Tracker, runner: Runner) -> Iterator[Any]:
    """A stock client's session."""
    from tvm import rpc

    client = rpc.connect_tracker("127.0.0.1", tracker.port)
    yield client.request("test", session_timeout=20)
    client.close()


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with local_device("--memory", "300M", "--disk", "20M", "--timeout", "20") as device:
        yield device
