"""The tuner's side: run programs on devices that are registered with a tracker.

On a device runs slmtvm's runner, or TVM's own RPC server.

    for device in devices("127.0.0.1:9190", "cortex-a78"):   # waits for a free one
        with device:                                         # given back at the end
            result = device.run(executable, ["--repeat", "5"], stdin=data, timeout_s=10)
            if result.ok: ...

``RpcError`` says that a device or the tracker was lost: take the next one. What a program does, be
it a crash or a hang, is no error but a ``JobResult``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from slmtvm.errors import RpcError
from slmtvm.rpc.job import JobResult, Jobs, RunnerJobs
from slmtvm.rpc.keygen import role_folder
from slmtvm.rpc.leash import Leashed
from slmtvm.rpc.relay import relay_to_runner
from slmtvm.rpc.session import Session, last_line
from slmtvm.rpc.slm_runner import PeerError, SetupError, TrackerLink, tracker_address
from slmtvm.rpc.stock_server import StockJobs, is_stock

MOST_STDOUT = 16 << 20  # bytes, by default
_SUMMARY, _REQUEST = 6, 4  # TVM's tracker codes
_UPLOAD, _REMOVE = "tvm.rpc.server.upload", "tvm.rpc.server.remove"
_POLL_SECONDS = 1.0


class Device:
    """A session with one runner, over a stock TVM client: nobody else uses the device meanwhile.

    A context manager; ``close`` gives the device back. Not for several threads at a time.
    """

    def __init__(self, remote: Any, key: str, address: str, relay: Leashed | None = None) -> None:
        """Raises RpcError where what answers there runs no programs, or is lost."""
        self.key, self.address = key, address
        self._session, self._relay = Session(remote, f"device {address}"), relay
        self._uploaded: dict[str, str] = {}  # sha256 -> name on the device
        self._jobs = _jobs(self._session)

    def run(
        self,
        executable: bytes,
        arguments: Sequence[str] = (),
        *,
        stdin: bytes = b"",
        timeout_s: float = 60.0,
        files: Mapping[str, bytes] | None = None,
        stdout_limit: int = MOST_STDOUT,
    ) -> JobResult:
        """Run a static executable of the device's ISA, and wait for its end.

        Its working folder holds ``files`` (name -> content) and is the session's. The same
        executable, and the same file of the same name, is sent once in a session. It may use the
        cores, the memory and the disk that the runner was started with, ``timeout_s`` seconds and
        ``stdout_limit`` bytes (64 MiB at most). Raises RpcError where the device is lost, or
        refuses (an executable for another machine, too little room).
        """
        name = self._send("x", executable)
        for file, content in (files or {}).items():
            self._send_as(file, content)
        return self._jobs.run(name, arguments, stdin, timeout_s, stdout_limit)

    def info(self) -> dict[str, Any]:
        """CPU model and features, caches, cores, frequencies and governors, memory, temperature.

        Behind ``--exec``, of the machine that the runner is on. "server" where it is no runner.
        """
        return self._jobs.info()

    def forget(self, executable: bytes) -> None:
        """Remove an executable from the device, which would keep it until the session's end."""
        name = self._uploaded.pop(_digest(executable), None)
        if name:
            self._session.call(_REMOVE, name)

    def close(self) -> None:
        """Give the device back."""
        self._session.close()
        if self._relay:
            self._relay.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _send(self, prefix: str, content: bytes) -> str:
        digest = _digest(content)
        if digest not in self._uploaded:
            self._session.call(_UPLOAD, f"{prefix}-{digest[:16]}", content)
            self._uploaded[digest] = f"{prefix}-{digest[:16]}"
        return self._uploaded[digest]

    def _send_as(self, name: str, content: bytes) -> None:
        key = f"{name} {_digest(content)}"
        if key in self._uploaded:
            return
        self._session.call(_UPLOAD, name, content)
        self._uploaded = {k: v for k, v in self._uploaded.items() if v != name}
        self._uploaded[key] = name


def _jobs(session: Session) -> Jobs:
    """What runs programs on a device, whichever server it has."""
    if session.has("slm.job.run"):
        return RunnerJobs(session)
    if is_stock(session):
        return StockJobs(session)
    raise RpcError("is neither an slmtvm runner nor TVM's RPC server", where=session.where)


@dataclass(frozen=True)
class Registered:
    """A device as the tracker knows it."""

    key: str
    address: str


@dataclass(frozen=True)
class Farm:
    """All devices of a tracker, and how many of a key are free and how many clients wait."""

    devices: tuple[Registered, ...]
    free: Mapping[str, int]
    waiting: Mapping[str, int]

    def count(self, key: str) -> int:
        """How many devices of ``key`` are registered, free or not."""
        return sum(device.key == key for device in self.devices)

    def __str__(self) -> str:
        lines = [f"{device.key:24} {device.address}" for device in self.devices]
        keys = sorted(
            {device.key for device in self.devices} | {k for k, n in self.waiting.items() if n}
        )
        lines += [
            f"{key}: {self.count(key)} registered, {self.free.get(key, 0)} free, "
            f"{self.waiting.get(key, 0)} waited for"
            for key in keys
        ]
        return "\n".join(lines or ["no device is registered"])


def registered(tracker: str, *, tls: Path | None = None) -> Farm:
    """What a tracker ("host:port") knows. Raises RpcError where it cannot be reached."""
    code, told = _ask(tracker, tls, [_SUMMARY])
    if code != 0:
        raise RpcError(f"answers with code {code}", where=f"tracker {tracker}")
    devices = sorted(
        (str(d["key"]).partition(":")[2], ":".join(map(str, d["addr"])))
        for d in told["server_info"]
    )
    queues = told["queue_info"]
    return Farm(
        tuple(Registered(*device) for device in devices),
        {key: queue["free"] for key, queue in queues.items()},
        {key: queue["pending"] for key, queue in queues.items()},
    )


def devices(
    tracker: str,
    key: str,
    *,
    tls: Path | None = None,
    session_s: float = 0.0,
    wait_s: float = 600.0,
) -> Iterator[Device]:
    """Devices of ``key``, one after the other, each when it is free.

    The caller gives each one back (``with device:``); one that was not is not given out again.
    tls: folder of the tuner's keys. session_s: after so many seconds the runner ends the session;
    0: never. wait_s: how long to wait for a free one. Raises RpcError where the tracker cannot be
    reached or no device of that key is free in time.
    """
    while True:
        yield _request(tracker, key, tls, session_s, time.monotonic() + wait_s)


def _request(tracker: str, key: str, tls: Path | None, session_s: float, deadline: float) -> Device:
    from tvm import rpc  # takes a while to import

    reason = f"no device {key!r} came free in time"
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise RpcError(f"{reason}; see slmtvm rpc devices", where=f"tracker {tracker}")
        if registered(tracker, tls=tls).count(key) == 0:
            reason = f"no device {key!r} is registered"
            time.sleep(min(_POLL_SECONDS, left))
            continue
        try:
            code, found = _ask(tracker, tls, [_REQUEST, key, "", 1], timeout=left)
        except RpcError:
            if time.monotonic() >= deadline:
                continue  # to the words above
            raise
        if code != 0:
            raise RpcError(f"answers with code {code}", where=f"tracker {tracker}")
        host, port, match = found
        relay = relay_to_runner(host, port, tls) if tls else None
        try:
            where = ("127.0.0.1", int(relay.said)) if relay else (host, port)
            return Device(rpc.connect(*where, match, session_s), key, f"{host}:{port}", relay)
        except Exception as error:  # it went away after it had registered: the next one
            reason = f"device {host}:{port} does not answer: {last_line(error)}"
            if relay:
                reason = relay.last_words() or reason
                relay.close()


def _ask(tracker: str, tls: Path | None, what: Any, timeout: float = 20.0) -> Any:
    where = f"tracker {tracker}"
    try:
        keys = str(role_folder(tls, "tuner")) if tls else None
        link = TrackerLink(tracker_address(tracker), keys, timeout)
        try:
            return link.ask(what)
        finally:
            link.close()
    except SetupError as error:
        raise RpcError(str(error)) from error
    except (OSError, PeerError) as error:
        raise RpcError(f"cannot be reached: {error}; is it running?", where=where) from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
