"""Running a measuring program on this machine, bounded in time, memory and files."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from slmtvm.errors import DeviceError
from slmtvm.tuning.measuring import Ran

_MOST_BYTES = 4 << 30  # of address space


class LocalRunner:
    """Runs programs here; ``prefix`` is a command that runs those of another ISA (qemu-user).

    ``gpu``: programs use a GPU, whose driver reserves addresses as it likes.
    """

    def __init__(self, prefix: Sequence[str] = (), *, gpu: bool = False) -> None:
        self._prefix = list(prefix)
        self._bounds_addresses = not prefix and not gpu  # so does an emulator

    def __call__(self, executable: bytes, arguments: Sequence[str], timeout: float) -> Ran:
        with tempfile.TemporaryDirectory(prefix="slmtvm-measure-") as folder:
            path = Path(folder) / "measure"
            path.write_bytes(executable)
            path.chmod(0o700)
            command = [*self._prefix, str(path), *arguments]
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, cwd=folder, start_new_session=True,
                    preexec_fn=self._bound,
                )  # fmt: skip
            except OSError as error:
                raise DeviceError(
                    f"cannot be started: {error.strerror}", where=command[0]
                ) from error
            try:
                out, err = process.communicate(timeout=timeout)
                status: int | None = process.returncode
            except subprocess.TimeoutExpired:
                _end(process)
                out, err = process.communicate()
                status = None
            except BaseException:
                _end(process)
                process.communicate()
                raise
            return Ran(status, out.decode(errors="replace"), err.decode(errors="replace"))

    def _bound(self) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        if self._bounds_addresses:
            resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
