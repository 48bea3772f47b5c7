"""How a program ended on a device, and what runs programs there."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from slmtvm.rpc.session import Session


@dataclass(frozen=True)
class JobResult:
    """How a program ended on a device.

    ``status``: its exit status, negative the signal that ended it, None where the runner killed it,
    for the reason in ``killed``: "time", or words about what it took too much of. ``stdout`` in
    full up to the limit, ``stderr`` its last 4,000 bytes. ``seconds`` wall clock of the process.
    ``hot``: the device did not cool down before. ``khz``: (before, after), of each core that tells.
    """

    status: int | None
    killed: str
    stdout: bytes
    stderr: str
    seconds: float
    hot: bool
    celsius: float | None
    khz: tuple[tuple[int | None, ...], tuple[int | None, ...]]

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with status 0."""
        return self.status == 0

    @property
    def reason(self) -> str:
        """In words what is wrong; "" where ``ok``."""
        if self.ok:
            return ""
        said = f": {self.stderr.strip()[-300:]}" if self.stderr.strip() else ""
        if self.killed == "time":
            return f"killed after {self.seconds:.1f} s{said}"
        if self.status is None:
            return f"killed: {self.killed}{said}"
        how = f"signal {-self.status}" if self.status < 0 else f"status {self.status}"
        return f"ended with {how}{said}"


class Jobs(Protocol):
    """Runs programs in a session's folder."""

    def run(
        self, name: str, arguments: Sequence[str], stdin: bytes, timeout_s: float, most_stdout: int
    ) -> JobResult:
        """Run the executable that was uploaded as ``name``, with that folder as the current one.

        Raises RpcError where the device is lost, or refuses.
        """

    def info(self) -> dict[str, Any]:
        """As ``Device.info``."""


class RunnerJobs:
    """The jobs of an slmtvm runner."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def run(
        self, name: str, arguments: Sequence[str], stdin: bytes, timeout_s: float, most_stdout: int
    ) -> JobResult:
        """As ``Jobs.run``."""
        raw = self._session.call(
            "slm.job.run", name, json.dumps(list(arguments)), stdin, float(timeout_s), most_stdout
        )
        (size,) = struct.unpack_from("<I", raw)
        told = json.loads(raw[4 : 4 + size])
        return JobResult(
            status=told["status"],
            killed=told["killed"],
            stdout=raw[4 + size :],
            stderr=told["stderr"],
            seconds=told["seconds"],
            hot=told["hot"],
            celsius=told["celsius"],
            khz=(tuple(told["khz_before"]), tuple(told["khz_after"])),
        )

    def info(self) -> dict[str, Any]:
        """As ``Device.info``."""
        found: dict[str, Any] = json.loads(self._session.call("slm.device.info"))
        return found
