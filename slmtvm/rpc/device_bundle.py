"""A bundle on a device: a static program of its code is sent there, with the weights, and asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmtvm.bundle.read import Bundle
from slmtvm.codegen.program import build_program, kept_program
from slmtvm.errors import BundleError, DeviceError, TargetError
from slmtvm.rpc.client import Device, devices
from slmtvm.rpc.job import JobResult

_SECONDS = 600.0  # of one job; the runner's own limit may be less
_MOST_OUTPUT = 64 << 20  # bytes; a runner gives no more

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where devices are: a tracker "host:port", a key, the folder of the tuner's keys.

    ``wait_s``: how long to wait for a free one.
    """

    tracker: str
    key: str
    tls: Path | None = None
    wait_s: float = 600.0


class DeviceBundle:
    """One target's code of a bundle, and its weights, on a device."""

    def __init__(
        self,
        device: Device,
        path: str | Path,
        target: str | None = None,
        *,
        programs: Path | None = None,
        progress: Progress = lambda _: None,
    ) -> None:
        """target: which of the bundle's; None: that which asks for most of what the device has.
        programs: the folder that programs are linked in, where the cache shall not keep them.

        Raises BundleError where the bundle is damaged or lacks the target, TargetError where the
        device can run none of them.
        """
        self.device = device
        self._programs = programs
        self.bundle = Bundle.open(path)
        entry = self.bundle.manifest.weights
        # A copy, since the client wants bytes, of what is read once more when it is opened there.
        self._files = {Path(entry.file).name: self.bundle.check_file(entry).read_bytes()}
        self.target, self._program, self.info = self._choose(target, progress)

    def run(self, *arguments: str, stdin: bytes = b"") -> bytes:
        """What the program writes; DeviceError where it, or the bundle, fails on the device."""
        result = self._run(self._program, arguments, stdin)
        if not result.ok:
            raise DeviceError(result.reason, where=self.where)
        return result.stdout

    def objects(self, *arguments: str) -> list[dict[str, Any]]:
        """The JSON objects that the program writes, one a line."""
        return [json.loads(line) for line in self.run(*arguments).splitlines()]

    @property
    def where(self) -> str:
        return f"{self.bundle.path} on the device {self.device.key} at {self.device.address}"

    def _run(self, program: bytes, arguments: Sequence[str], stdin: bytes = b"") -> JobResult:
        result = self.device.run(
            program, [".", *arguments], stdin=stdin, timeout_s=_SECONDS, files=self._files,
            stdout_limit=_MOST_OUTPUT,
        )  # fmt: skip
        self._files = {}  # they stay there until the session ends
        return result

    def _linked(self, target: str, progress: Progress) -> bytes:
        if self._programs is None:
            return kept_program(self.bundle, target, "device", progress=progress).read_bytes()
        path = self._programs / f"slm-device.{target}"
        if not path.is_file():
            self._programs.mkdir(exist_ok=True)
            build_program(self.bundle, target, "device", path, progress=progress)
        return path.read_bytes()

    def _choose(
        self, target: str | None, progress: Progress
    ) -> tuple[str, bytes, dict[str, Any]]:  # fmt: skip
        info = self.device.info()
        entries = self.bundle.manifest.targets
        if target is not None and target not in self.bundle.targets:
            raise BundleError(
                f"no library for target {target!r}; there are {', '.join(self.bundle.targets)}",
                where=f"{self.bundle.path}",
            )
        names = [target] if target else sorted(
            self.bundle.targets, key=lambda name: -len(entries[name].requires)
        )  # fmt: skip
        reasons = []
        for name in names:
            if not info["exec"] and info["machine"] != entries[name].arch:
                reasons.append(f"{name}: it is {info['machine']}, not {entries[name].arch}")
                continue
            program = self._linked(name, progress)
            progress("sending the bundle to the device")
            result = self._run(program, ["check"])
            if result.ok:
                told = self._run(program, ["info"])
                return name, program, json.loads(told.stdout)
            self.device.forget(program)
            reasons.append(f"{name}: {result.reason}")
        raise TargetError(f"runs nothing of this bundle: {'; '.join(reasons)}", where=self.where)


@contextmanager
def on_device(
    place: Place,
    path: str | Path,
    target: str | None = None,
    *,
    progress: Progress = lambda _: None,
) -> Iterator[DeviceBundle]:
    """The bundle on the next free device of ``place``, which is given back at the end.

    Raises RpcError where there is none, and as ``DeviceBundle`` does.
    """
    progress(f"waiting for a device {place.key}")
    with next(devices(place.tracker, place.key, tls=place.tls, wait_s=place.wait_s)) as device:
        yield DeviceBundle(device, path, target, progress=progress)
