"""What a bench asks of the machine that it measures, and this machine's answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from slmtvm.bench.busy import Busy, Watch, watch_for
from slmtvm.bench.limits import LimitProbe, Limits
from slmtvm.bench.phases import (
    REPETITIONS,
    Phases,
    Profile,
    Timed,
    read_source,
    some_tokens,
)
from slmtvm.host import cpu_name
from slmtvm.runtime import load
from slmtvm.target import Target, known_targets

FIRST_PROMPT = 16
IDLE_SECONDS = 0.2  # in which the machine is watched before it is measured


@dataclass(frozen=True)
class Opened:
    """What opening a bundle showed: ``how`` as ``Session.how``, seconds, bytes.

    ``load``: with the checksum of all weights, ``map`` without; ``first``: of a first ``prompt`` of
    so many tokens; ``resident``: after a full context. ``busy``: the machine before.
    """

    how: Mapping[str, Any]
    busy: Busy
    load: float
    map: float
    first: float
    prompt: int
    resident: int


class MeasuredPhases(Protocol):
    """The phases of one bundle with one number of threads; see ``Phases``."""

    def working_set(self) -> float: ...

    def profiles(self) -> list[Profile]: ...

    def timed(self) -> list[Timed]: ...


class LimitSource(Protocol):
    """Measures what the machine allows."""

    def measure(self, threads: int) -> Limits: ...


class Machine(Protocol):
    """A machine with a bundle."""

    @property
    def bundle(self) -> Path: ...

    @property
    def info(self) -> dict[str, Any]:
        """What the library holds."""

    @property
    def cpu(self) -> str: ...

    def open(self) -> Opened:
        """Open it, some times: the first that is called."""

    def phases(self, threads: int) -> AbstractContextManager[MeasuredPhases]: ...

    def limits(self, working_set: int) -> LimitSource:
        """working_set: bytes that are read again and again."""

    def busy(self) -> Busy:
        """How busy the machine was with other things since it was opened."""


class LocalMachine:
    """This machine."""

    def __init__(self, bundle: Path, target: str | None, cores: str | None) -> None:
        self.bundle, self._target, self._cores = bundle, target, cores
        with load(bundle, threads=0, cores=cores, target=target) as session:
            self._how, self.info = session.how, session.info
        self.cpu = cpu_name()
        self._watch = Watch()

    def open(self) -> Opened:
        path, target = self.bundle, self._target
        busy, self._watch = watch_for(IDLE_SECONDS), Watch()
        load_s = _best(lambda: load(path, target=target).close())
        map_s = _best(lambda: load(path, target=target, check=False).close())
        first, prompt, resident = _first_and_full(path, target)
        return Opened(self._how, busy, load_s, map_s, first, prompt, resident)

    def phases(self, threads: int) -> Phases:
        return Phases(self.bundle, self._target, threads, self._cores)

    def limits(self, working_set: int) -> LimitProbe:
        # The target whose instructions reach the limits; the host's for one of somebody's own.
        name = self.info["target"]
        return LimitProbe(Target.load(name if name in known_targets() else "host"), working_set)

    def busy(self) -> Busy:
        return self._watch.read()


def _first_and_full(path: Path, target: str | None) -> tuple[float, int, int]:
    """Seconds of a first prompt, its tokens; and what was resident after a full context."""
    before = _resident()
    with load(path, target=target) as session:
        info = session.info
        prompt = min(FIRST_PROMPT, info["context"])
        started = time.perf_counter()
        read_source(session)
        if info["kind"] != "encoder" and info["output_size"] == info["vocab_size"]:
            next(session.generate(some_tokens(prompt, info), 1))
        elif info["kind"] != "encoder":
            session.eval(some_tokens(prompt, info))
        else:
            session.encode(some_tokens(prompt, info))
        seconds = time.perf_counter() - started
        rest = info["context"] - prompt
        if info["kind"] != "encoder" and rest:
            session.eval(some_tokens(rest, info))
        elif rest:
            session.encode(some_tokens(info["context"], info))
        return seconds, prompt, _resident() - before


def _best(action: Callable[[], object]) -> float:
    times = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


def _resident() -> int:
    """Bytes of this process that are in memory."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmRSS")
