"""One bundle with one number of threads: its phases timed, and profiled by kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmtvm.bench.work import total_work
from slmtvm.errors import DeviceError
from slmtvm.runtime import Session, interface, load
from slmtvm.runtime.model import Model

PREFILLS = (16, 128, 512)  # tokens
POSITIONS = (0, 128, 256, 512, 1024, 2048)  # of a decode; the last that the context allows as well
DECODE_TOKENS = 100
PROFILED_PREFILL, PROFILED_POSITION = 128, 512
REPETITIONS = 5
LEAST_SECONDS = 0.3  # of repeated prefills

Times = list[float]


@dataclass(frozen=True)
class Profile:
    """The times of kernels in one phase, whose rows attend to ``attended`` positions."""

    name: str
    attended: float
    times: dict[str, interface.KernelTime]


@dataclass(frozen=True)
class Timed:
    """``times`` are of equal parts of ``tokens``, ``parts`` of which make them all; ``calls`` of
    kernels are those of all tokens."""

    phase: str
    threads: int
    position: int
    tokens: int
    parts: int
    times: Times
    calls: dict[str, int]


@dataclass(frozen=True)
class PhasePlan:
    """What is measured of a bundle: ``prefills``, and ``count`` tokens from ``positions`` on."""

    decoder: bool
    prefills: tuple[int, ...]
    positions: tuple[int, ...]
    count: int

    @staticmethod
    def of(info: Mapping[str, Any]) -> PhasePlan:
        """For a bundle that ``info`` of a session describes."""
        context = int(info["context"])
        prefills = tuple(n for n in PREFILLS if n <= context) or (context,)
        if info["kind"] == "encoder":
            return PhasePlan(False, prefills, (), 0)
        count = min(DECODE_TOKENS, context // 2)
        last = context - count
        positions = tuple(sorted({*(p for p in POSITIONS if p < last), last}))
        return PhasePlan(True, prefills, positions, count)

    @property
    def phase(self) -> str:
        """What many tokens at a time are called."""
        return "prefill" if self.decoder else "encode"

    @property
    def profiled_prefill(self) -> int:
        """The prefill whose kernels are shown."""
        return max(n for n in self.prefills if n <= PROFILED_PREFILL or n == self.prefills[0])

    @property
    def profiled_position(self) -> int:
        """The decode whose kernels are shown."""
        return max(p for p in self.positions if p <= PROFILED_POSITION)


class Phases:
    """One bundle with one number of threads: a session to time, and one that is profiled."""

    def __init__(
        self, path: Path, target: str | None, threads: int, cores: str | None = None
    ) -> None:
        self.threads = threads
        self.session = load(path, threads=threads, cores=cores, target=target)
        model = Model(path, threads=threads, cores=cores, target=target, profile=True)
        self.profiled = Session(model, owns_model=True)
        self._described = self.session.info["kernels"]
        self._plan = PhasePlan.of(self.session.info)
        for session in (self.session, self.profiled):
            read_source(session)

    def __enter__(self) -> Phases:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()
        self.profiled.close()

    def working_set(self) -> float:
        """Bytes of weights that are read again and again: for a token, or a short text."""
        self._decode_once(self.profiled, 0) if self._plan.decoder else self._prefill(
            self.profiled, 1
        )
        return total_work(self._described, self._calls(), 0).bytes_read

    def profiles(self) -> list[Profile]:
        """Where the time goes in a prefill and, for a decoder, in a decode in mid context."""
        tokens = self._plan.profiled_prefill
        self._prefill(self.profiled, tokens)
        self.profiled.model.take_profile()
        self._prefill(self.profiled, tokens)
        found = [self._profile(f"{self._plan.phase} {tokens}", 0, tokens)]
        if self._plan.decoder:
            position = self._plan.profiled_position
            self._fill(self.profiled, position)
            self.profiled.model.take_profile()
            self._decode(self.profiled, position)
            found.append(self._profile(f"decode at {position}", position, self._plan.count))
        return found

    def timed(self) -> list[Timed]:
        """The times of every phase."""
        found = []
        for tokens in self._plan.prefills:
            self._prefill(self.profiled, tokens)
            calls = self._calls()
            times = _repeated(lambda n=tokens: self._prefill(self.session, n))  # type: ignore[misc]
            found.append(Timed(self._plan.phase, self.threads, 0, tokens, 1, times, calls))
        if not self._plan.decoder:
            return found
        self._fill(self.session, self._plan.positions[-1])
        decodes = []
        for position in reversed(self._plan.positions):  # stepping back keeps what lies before
            self._fill(self.profiled, position)
            self._calls()
            self._decode(self.profiled, position)
            calls = self._calls()
            times = self._decode(self.session, position)
            count = self._plan.count
            decodes.append(Timed("decode", self.threads, position, count, count, times, calls))
        return found + decodes[::-1]

    def _profile(self, name: str, position: int, tokens: int) -> Profile:
        times = self.profiled.model.take_profile()
        return Profile(name, attended(position, tokens), times)

    def _prefill(self, session: Session, tokens: int) -> float:
        """Seconds of one call on an empty context."""
        ids = some_tokens(tokens, session.info)
        if self._plan.decoder:
            session.reset()
        started = time.perf_counter()
        if self._plan.decoder:
            session.eval(ids)
        else:
            session.encode(ids)
        return time.perf_counter() - started

    def _decode(self, session: Session, position: int) -> Times:
        """Seconds of each of the tokens from ``position`` on; what is before them must be there."""
        _go_back(session, position)
        first = some_tokens(1, session.info)
        times = []
        before = time.perf_counter()
        for _ in session.generate(first, self._plan.count):
            now = time.perf_counter()
            times.append(now - before)
            before = now
        return times

    def _decode_once(self, session: Session, position: int) -> None:
        _go_back(session, position)
        session.eval(some_tokens(1, session.info))

    def _fill(self, session: Session, position: int) -> None:
        """Have ``position`` tokens in the context."""
        missing = position - session.position
        if missing > 0:
            session.eval(some_tokens(missing, session.info))
        _go_back(session, position)

    def _calls(self) -> dict[str, int]:
        """Calls of each kernel since the last time."""
        return {name: time.calls for name, time in self.profiled.model.take_profile().items()}


def _go_back(session: Session, position: int) -> None:
    """Forget the tokens from ``position`` on; where layers with a window do not have what is seen
    from there any more, those before it are evaluated again."""
    try:
        session.seek(position)
    except DeviceError:
        session.reset()
        session.eval(some_tokens(position, session.info))


def read_source(session: Session) -> None:
    """Give an encoder-decoder the source that it attends to, as long as it may be."""
    if session.info["kind"] == "encoder-decoder":
        session.encode(some_tokens(session.info["source_context"], session.info))


def attended(position: int, tokens: int) -> float:
    """Positions that ``tokens`` rows from ``position`` on attend to, on average."""
    return position + (tokens + 1) / 2


def some_tokens(count: int, info: dict[str, Any]) -> np.ndarray:
    """Token ids for a session of this ``info``; every token costs the same, whatever it is."""
    tokens = (np.arange(count, dtype=np.int32) * 7 + 3) % int(info["vocab_size"])
    if info.get("final_token") is not None:
        tokens[-1] = info["final_token"]
    return tokens


def _repeated(measure: Callable[[], float]) -> Times:
    """At least REPETITIONS results of ``measure``, for at least LEAST_SECONDS, after one more."""
    measure()
    times: Times = []
    while len(times) < REPETITIONS or sum(times) < LEAST_SECONDS:
        times.append(measure())
    return times
