"""Jobs on a device where TVM's own RPC server runs, which has none: a library that it loads runs
them.

Each program has a process of its own, so that one that crashes or hangs does not end the server.
What a runner does besides is not done: cores are not pinned, nothing waits until the device is
cool, files are not bounded together, and the server's user is the program's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from slmtvm.codegen.c_runtime import kept_object
from slmtvm.codegen.zig import zig_cc
from slmtvm.errors import RpcError
from slmtvm.host import architectures
from slmtvm.rpc.job import JobResult
from slmtvm.rpc.session import Session
from slmtvm.rpc.slm_runner import (
    board_cores,
    caches,
    cores_of,
    cpu,
    frequencies,
    memory_bytes,
    temperature,
)

_UPLOAD, _DOWNLOAD, _REMOVE, _FOLDER = (
    f"tvm.rpc.server.{name}" for name in ("upload", "download", "remove", "workpath")
)
_STDIN, _STDOUT, _STDERR = "slm-stdin", "slm-stdout", "slm-stderr"
_MOST_BYTES = 4 << 30  # of a program's addresses
_STDERR_BYTES = 4000
_LINK_FLAGS = ("-nostdlib", "-shared", "-s", "-Wl,-z,now", "-Wl,--build-id=none")
# As jobs.c has them.
_NO_TIME_LEFT, _NOT_STARTED, _BAD_CALL = -1000, -1001, -1002
_TOO_MUCH_WRITTEN = -25  # SIGXFSZ


def is_stock(session: Session) -> bool:
    """Whether a server offers what jobs need of TVM's own."""
    return all(session.has(name) for name in (_UPLOAD, _DOWNLOAD, _REMOVE, _FOLDER))


class StockJobs:
    """The jobs of TVM's RPC server (``python -m tvm.exec.rpc_server``, or ``tvm_rpc``)."""

    def __init__(self, session: Session) -> None:
        """Raises RpcError where the server cannot load the library: it is no Linux, or of an
        architecture that no target has."""
        self._session = session
        self._machine = self._load()
        self._folder = str(session.call(_FOLDER, ""))
        self._memory = min(_MOST_BYTES, memory_bytes(self._read))
        self._has_stdin = False

    def run(
        self, name: str, arguments: Sequence[str], stdin: bytes, timeout_s: float, most_stdout: int
    ) -> JobResult:
        """As ``Jobs.run``."""
        if any("\n" in argument for argument in arguments):
            raise RpcError("takes no argument of several lines", where=self._session.where)
        if stdin:
            self._session.call(_UPLOAD, _STDIN, stdin)
        elif self._has_stdin:
            self._session.call(_REMOVE, _STDIN)
        self._has_stdin = bool(stdin)
        found = int(
            self._session.call(
                "slm_run", self._folder, name, "\n".join(arguments), int(timeout_s * 1e3),
                self._memory, most_stdout,
            )
        )  # fmt: skip
        status = (found & 0xFFFF) - (found & 0x8000) * 2
        if status in (_NOT_STARTED, _BAD_CALL):
            raise RpcError("cannot start a program", where=self._session.where)
        killed = {
            _NO_TIME_LEFT: "time",
            _TOO_MUCH_WRITTEN: f"it wrote more than {most_stdout:,} bytes to a file",
        }.get(status, "")
        return JobResult(
            status=None if killed else status,
            killed=killed,
            stdout=bytes(self._session.call(_DOWNLOAD, _STDOUT)),
            stderr=bytes(self._session.call(_DOWNLOAD, _STDERR))[-_STDERR_BYTES:].decode(
                errors="replace"
            ),
            seconds=(found >> 16) / 1e6,
            hot=False,
            celsius=None,
            khz=((), ()),
        )

    def info(self) -> dict[str, Any]:
        """As ``Device.info``, with "server": what it is that measures there."""
        read = self._read
        cores = self._cores()
        return {
            "server": "TVM's own",
            "machine": self._machine,
            "system": read("/proc/sys/kernel/osrelease"),
            "exec": [],
            **cpu(read),
            "cores": cores,
            "caches": caches(cores[0], read),
            "frequency_khz": frequencies(cores, read),
            "memory_bytes": memory_bytes(read),
            "job_memory_bytes": self._memory,
            "celsius": temperature(read),
            "python": "",
        }

    def _cores(self) -> list[int]:
        """Those that the server may use."""
        for line in self._read("/proc/self/status").splitlines():
            name, _, value = line.partition(":")
            if name == "Cpus_allowed_list":
                return cores_of(value.strip())
        return board_cores(self._read)

    def _read(self, path: str) -> str:
        """A text file of the device; "" where there is none."""
        if int(self._session.call("slm_read", self._folder, path)) <= 0:
            return ""
        return bytes(self._session.call(_DOWNLOAD, _STDOUT)).decode(errors="replace").strip()

    def _load(self) -> str:
        """Have the library loaded that fits; its architecture. The server does not say its own."""
        errors = []
        for arch in architectures():
            name = f"slm-jobs-{arch}.so"
            self._session.call(_UPLOAD, name, _library(arch))
            try:
                self._session.load(name, "slm_run", "slm_read")
                return arch
            except RpcError as error:
                errors.append(f"{arch}: {error}")
            self._session.call(_REMOVE, name)
        raise RpcError(
            f"loads no library that could run programs: {'; '.join(errors)}; start a runner there "
            "(slmtvm runner pack)",
            where=self._session.where,
        )


@cache
def _library(arch: str) -> bytes:
    """The library of jobs.c for an architecture. It needs nothing but the libc that is loaded."""
    import tvm_ffi.libinfo

    triple = f"{arch}-linux-musl"
    headers = [
        Path(found())
        for found in (tvm_ffi.libinfo.find_include_path, tvm_ffi.libinfo.find_dlpack_include_path)
    ]
    source = resources.files("slmtvm.rpc") / "stock" / "jobs.c"
    with resources.as_file(source) as path, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = kept_object(triple, "stock-jobs", [path], folder, headers=headers)
        zig_cc(triple, [*_LINK_FLAGS, str(jobs.absolute()), "-o", "jobs.so"], folder=folder)
        return (folder / "jobs.so").read_bytes()
