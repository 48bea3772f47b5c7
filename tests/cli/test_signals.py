"""A compile that is told to end leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slmtvm.cli.signals import Terminated, unwinding
from tests.cli.command import ROOT
from tests.models import model_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [("before", signal.SIGHUP, 129), ("kernels.o", signal.SIGTERM, 143)],
)
def test_a_compile_that_is_ended_leaves_nothing(
    tmp_path: Path, moment: str, number: int, code: int
) -> None:
    """Before the bundle's folder is there, and while the linker runs in it."""
    command = ["compile", str(model_path("demo")), "-o", str(tmp_path / "x.slm")]
    process = subprocess.Popen(
        [sys.executable, "-m", "slmtvm.cli", *command],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Whoever runs the tests may ignore it (nohup), and so would the process.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip

    def reached() -> bool:
        if moment == "before":
            return catches(process.pid, number)
        return bool(list(tmp_path.rglob(moment)))

    while not reached():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output, errors) == (code, "", "")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_an_event_loop_wherever_it_finds_it() -> None:
    """In a callback, too, whose exceptions the loop keeps to itself."""

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(os.kill, os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(loop.create_future(), 20)

    with pytest.raises(Terminated) as ended, unwinding():
        asyncio.run(serve())
    assert ended.value.number == signal.SIGTERM


def catches(process: int, number: int) -> bool:
    """Whether the process has a handler for the signal yet."""
    status = Path(f"/proc/{process}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)
