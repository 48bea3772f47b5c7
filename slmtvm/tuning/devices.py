"""Measuring on the devices of a tracker, all that are free, and going on when one is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from slmtvm.bench.limits import Limits
from slmtvm.bench.on_device import DeviceLimits
from slmtvm.errors import RpcError
from slmtvm.rpc.client import Device, devices, registered
from slmtvm.rpc.target_check import check_target
from slmtvm.target import Target
from slmtvm.tuning.building import Builder, build_here
from slmtvm.tuning.measuring import Batch, Measurement, Ran

_LOSSES = 5
"""Devices that may be lost in a row before a batch is given up."""
_RETRY_S = 1.0
"""Between two questions to a tracker that does not answer."""
_LEAST_SETTINGS = 3
"""Of a batch on one device: each measures the default as well."""


@dataclass
class _Held:
    device: Device
    info: Mapping[str, Any]

    def run(self, executable: bytes, arguments: Sequence[str], timeout: float) -> Ran:
        result = self.device.run(executable, arguments, timeout_s=timeout)
        self.device.forget(executable)  # the next batch is another one
        status = None if result.killed == "time" else result.status
        reason = f"killed: {result.killed}" if result.killed else result.stderr
        if result.killed and result.killed != "time":
            status = 1
        return Ran(status, result.stdout.decode(errors="replace"), reason)


class DeviceMeasurer:
    """Measures on the devices that a tracker has under ``key``: a context manager, which gives them
    back at the end.

    A batch is divided among all that are free; what a lost one was to measure, another does.
    """

    def __init__(
        self,
        target: Target,
        tracker: str,
        key: str,
        *,
        tls: Path | None = None,
        wait_s: float = 600.0,
        progress: Callable[[str], None] = lambda _: None,
        builder: Builder | None = None,
    ) -> None:
        """tracker: "host:port". tls: folder of the tuner's keys. builder: of programs, this process
        where None. wait_s: how long to wait for a
        device at most, when all are busy or lost."""
        self._target, self._tracker, self._key, self._tls = target, tracker, key, tls
        self._progress = progress
        self._build = builder or build_here(progress)
        self._wait_s = wait_s
        self._reached = False  # the tracker, once: before that, its address may be wrong
        self._held: list[_Held] = []

    def __enter__(self) -> DeviceMeasurer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with ExitStack() as stack:
            for held in self._held:
                stack.callback(held.device.close)
        self._held = []

    def measure(self, batch: Batch) -> list[Measurement]:
        """Raises RpcError where devices are lost again and again, or the tracker is; TargetError
        where one cannot run what is compiled for the target."""
        left = list(batch.settings)
        found: dict[int, Measurement] = {}
        losses = 0
        while left:
            self._take(1 + len(left) // _LEAST_SETTINGS)
            parts = [left[i :: len(self._held)] for i in range(len(self._held))]
            pairs = [
                (held, part) for held, part in zip(self._held, parts, strict=True) if part
            ]  # fmt: skip
            programs = self._build(
                [replace(batch, settings=part) for _, part in pairs], self._target
            )
            left, errors = [], []
            with ThreadPoolExecutor(len(pairs)) as pool:
                running = [
                    pool.submit(program.run, held.run, held.info)
                    for program, (held, _) in zip(programs, pairs, strict=True)
                ]
            for future, (held, part) in zip(running, pairs, strict=True):
                try:
                    for knobs, measurement in zip(part, future.result(), strict=True):
                        found[id(knobs)] = measurement
                except RpcError as error:
                    errors.append(error)
                    left += part
                    self._held.remove(held)
                    held.device.close()
            losses = losses + len(errors) if errors else 0
            if losses >= _LOSSES:
                raise RpcError(
                    f"{losses} devices were lost in a row; the last: {errors[-1]}",
                    where=f"tracker {self._tracker}",
                )
        return [found[id(knobs)] for knobs in batch.settings]

    def limits(self, working_set: int, threads: int) -> Limits:
        """What one of the devices allows where ``working_set`` bytes are read again and again;
        raises as ``measure`` does."""
        for last in (*[False] * (_LOSSES - 1), True):
            self._take(1)
            held = self._held[0]
            try:
                return DeviceLimits(held.device, self._target, working_set).measure(threads)
            except RpcError:
                self._held.remove(held)
                held.device.close()
                if last:
                    raise
        raise AssertionError("the last loss is raised")

    @contextmanager
    def device(self) -> Iterator[Device]:
        """One of the devices; raises as ``measure`` does, and gives up the one that is lost."""
        self._take(1)
        held = self._held[0]
        try:
            yield held.device
        except RpcError:
            self._held.remove(held)
            held.device.close()
            raise

    def _take(self, most: int) -> None:
        """Hold one device, waiting for it, and more of those that are free, up to ``most``."""
        while not self._held or (len(self._held) < most and self._free()):
            if not self._held:
                self._progress(f"waiting for a device {self._key}")
            device = self._next()
            try:
                check_target(device, self._target)
                info = device.info()
            except RpcError:
                device.close()
                continue
            except BaseException:
                device.close()
                raise
            self._held.append(_Held(device, _facts(info, device)))

    def _free(self) -> int:
        """How many more devices there are; none while the tracker does not answer, since those
        that are held can do without it."""
        try:
            return registered(self._tracker, tls=self._tls).free.get(self._key, 0)
        except RpcError:
            return 0

    def _next(self) -> Device:
        """The next free device, whatever becomes of the tracker meanwhile."""
        deadline = time.monotonic() + self._wait_s
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            try:
                device = next(devices(self._tracker, self._key, tls=self._tls, wait_s=left))
            except RpcError as error:
                if not self._reached or time.monotonic() + _RETRY_S >= deadline:
                    raise
                self._progress(f"waiting for a device {self._key}: {error}")
                time.sleep(_RETRY_S)
                continue
            self._reached = True
            return device


def _facts(info: Mapping[str, Any], device: Device) -> dict[str, Any]:
    """What records keep of a device."""
    kept = ("server", "machine", "exec", "features", "cores", "caches", "frequency_khz")
    facts = {name: info[name] for name in kept if info.get(name)}
    return {"cpu": info.get("model") or device.key, "key": device.key, **facts}
