"""Trackers and runners as a user starts them: processes of their own."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from slmtvm.errors import RpcError
from slmtvm.rpc import slm_runner
from slmtvm.rpc.client import registered

ROOT = Path(__file__).resolve().parents[2]
RUNNER = slm_runner.__file__
SECONDS = 60.0  # that anything is waited for


class Process:
    """A command whose output is kept, line by line."""

    def __init__(self, command: Sequence[str]) -> None:
        self.lines: list[str] = []
        self._new: queue.Queue[str] = queue.Queue()
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            # Whoever runs the tests in the background has it ignored, and so would the process.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line)
            self._new.put(line)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line from here on that matches."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                line = self._new.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                raise AssertionError(f"no {pattern!r} in {self.lines}") from None
            if found := re.search(pattern, line):
                return found

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.alive:
            self.process.send_signal(number)
        code = self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        if self.process.stdout:
            self.process.stdout.close()
        return code


class Tracker(Process):
    """``slmtvm rpc tracker``; ``address`` is where it listens."""

    def __init__(self, port: int = 0, *options: str) -> None:
        super().__init__(
            [sys.executable, "-m", "slmtvm.cli", "rpc", "tracker", "--port", str(port), *options]
        )
        self.port = int(self.wait_for(r"tracker on 127\.0\.0\.1:(\d+)").group(1))
        self.address = f"127.0.0.1:{self.port}"


class _Stock(Process):
    """A server of TVM's own, which leaves children behind that listen where it alone is ended."""

    def __init__(self, name: str, port: int, *options: str) -> None:
        super().__init__(
            [sys.executable, "-m", f"tvm.exec.{name}", "--host", "127.0.0.1", "--port", str(port),
             "--port-end", str(port + 100), *options]
        )  # fmt: skip
        self.port = int(self.wait_for(r"bind to 127\.0\.0\.1:(\d+)").group(1))
        self.address = f"127.0.0.1:{self.port}"

    def end(self, number: int = signal.SIGTERM) -> int:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        return super().end(number)


class StockTracker(_Stock):
    """``python -m tvm.exec.rpc_tracker``."""

    def __init__(self) -> None:
        super().__init__("rpc_tracker", 19190)


class StockServer(_Stock):
    """``python -m tvm.exec.rpc_server``, registered as ``key``."""

    def __init__(self, tracker: StockTracker, key: str) -> None:
        super().__init__("rpc_server", 19300, "--tracker", tracker.address, "--key", key)


class Runner(Process):
    """``slm_runner.py`` by itself; ``port`` is where it listens."""

    def __init__(self, *options: str) -> None:
        super().__init__([sys.executable, RUNNER, "--retry", "0.2", *options])
        self.port = int(self.wait_for(r"listening on 127\.0\.0\.1:(\d+)").group(1))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextmanager
def running(*processes: Process) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.end()


def wait_until_registered(
    tracker: Tracker | StockTracker, key: str, count: int = 1, tls: Path | None = None
) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            if registered(tracker.address, tls=tls).count(key) == count:
                return
        except RpcError:
            pass
        assert time.monotonic() < deadline, f"no {count} devices {key!r}"
        time.sleep(0.05)
