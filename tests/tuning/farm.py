"""A tracker and devices on loopback: emulators behind runners."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from slmtvm.errors import RpcError
from slmtvm.rpc import slm_runner
from slmtvm.rpc.client import registered

_SECONDS = 60.0
_TRACKER = """
import socket, sys
from tvm.rpc.tracker import TrackerServerHandler
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
TrackerServerHandler(server, "stop").run()
"""


class Farm:
    """A tracker, TVM's own, and the runners that were started for it; all end with ``close``."""

    def __init__(self) -> None:
        self.address = f"127.0.0.1:{_free_port()}"
        self._stack = ExitStack()
        self._start("-c", _TRACKER, *self.address.split(":"))
        try:
            self._wait(lambda: True)
        except BaseException:
            self.close()
            raise

    def runner(self, key: str, command: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """A device of ``key`` whose programs run under ``command``, registered."""
        count = registered(self.address).count(key)
        process = self._start(
            slm_runner.__file__, "--tracker", self.address, "--key", key,
            *(["--exec", " ".join(command)] if command else []),
        )  # fmt: skip
        self._wait(lambda: registered(self.address).count(key) > count)
        return process

    def close(self) -> None:
        self._stack.close()

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._stack.callback(_end, process)
        return process

    def _wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(RpcError):
                registered(self.address)
                if ready():
                    return
            time.sleep(0.1)
        raise TimeoutError("the farm does not come up")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def farm() -> Iterator[Farm]:
    made = Farm()
    try:
        yield made
    finally:
        made.close()
