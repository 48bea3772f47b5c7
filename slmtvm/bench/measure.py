"""The public call: opens a bundle, measures it, and what the machine would allow."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from slmtvm.bench.limits import LimitProbe, Limits
from slmtvm.bench.report import BenchReport, KernelTime, Rate
from slmtvm.bench.work import kernel_times, total_work
from slmtvm.runtime import Session, load
from slmtvm.runtime.model import Model
from slmtvm.target import Target

PREFILLS = (16, 128, 512)  # tokens
POSITIONS = (0, 128, 256, 512, 1024, 2048)  # of a decode; the last that the context allows as well
DECODE_TOKENS = 100
FIRST_PROMPT = 16
PROFILED_PREFILL, PROFILED_POSITION = 128, 512
_REPETITIONS = 5
_LEAST_SECONDS = 0.3  # of repeated prefills

Progress = Callable[[str], None]
Times = list[float]


def bench(
    bundle: str | Path,
    *,
    threads: Sequence[int] | None = None,
    target: str | None = None,
    progress: Progress = lambda _: None,
) -> BenchReport:
    """Measure ``bundle`` on this machine for each number of ``threads``, by default 1 to all cores.

    target: which of the bundle's libraries; the best for this machine where None. progress: called
    with the name of each step as it begins. Raises SlmError where the bundle cannot run here.
    """
    counts = list(threads or range(1, len(os.sched_getaffinity(0)) + 1))
    path = Path(bundle)
    progress("load")
    load_ms = 1e3 * _best(lambda: load(path, target=target).close())
    map_ms = 1e3 * _best(lambda: load(path, target=target, check=False).close())
    first_ms, prompt, resident = _first_and_full(path, target)
    limits, rates, kernels = [], [], []
    probe: LimitProbe | None = None
    for count in counts:
        progress(f"threads {count}: what takes the time")
        with _Bench(path, target, count) as run:
            info = run.session.info
            if probe is None:
                working_set = int(run.working_set())
                progress("limits of this machine")
                probe = LimitProbe(Target.load(info["target"]), working_set)
            limit = probe.measure(count)
            limits.append(limit)
            kernels += run.profile(limit)
            progress(f"threads {count}: tokens per second")
            rates += run.rates(limit)
    return BenchReport(
        bundle=path.name,
        target=info["target"],
        cpu=_cpu(),
        kind=info["kind"],
        context=info["context"],
        weights_bytes=info["memory"]["weights"],
        load_ms=load_ms,
        map_ms=map_ms,
        first_token_ms=first_ms,
        first_token_prompt=prompt,
        resident_bytes=resident,
        limits=tuple(limits),
        rates=tuple(rates),
        kernels=tuple(kernels),
    )


class _Bench:
    """One bundle with one number of threads: a session to time, and one that is profiled."""

    def __init__(self, path: Path, target: str | None, threads: int) -> None:
        self.threads = threads
        self.session = load(path, threads=threads, target=target)
        model = Model(path, threads=threads, target=target, profile=True)
        self.profiled = Session(model, owns_model=True)
        self._described = self.session.info["kernels"]
        self._decoder = self.session.info["kind"] == "decoder"
        context = self.session.info["context"]
        self._prefills = [n for n in PREFILLS if n <= context] or [context]
        self._count = min(DECODE_TOKENS, context // 2)
        last = context - self._count
        self._positions = sorted({*(p for p in POSITIONS if p < last), last})

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()
        self.profiled.close()

    def working_set(self) -> float:
        """Bytes of weights that are read again and again: for a token, or a short text."""
        self._decode_once(self.profiled, 0) if self._decoder else self._prefill(self.profiled, 1)
        return total_work(self._described, self._calls(), 0).bytes_read

    def profile(self, limits: Limits) -> list[KernelTime]:
        """Where the time goes in a prefill and, for a decoder, in a decode in mid context."""
        phase = "prefill" if self._decoder else "encode"
        tokens = max(n for n in self._prefills if n <= PROFILED_PREFILL or n == self._prefills[0])
        self._prefill(self.profiled, tokens)
        self._calls()
        self._prefill(self.profiled, tokens)
        rows = kernel_times(
            f"{phase} {tokens}", self._described, self.profiled.model.take_profile(),
            _attended(0, tokens), limits,
        )  # fmt: skip
        if self._decoder:
            position = max(p for p in self._positions if p <= PROFILED_POSITION)
            self._fill(self.profiled, position)
            self._calls()
            self._decode(self.profiled, position)
            rows += kernel_times(
                f"decode at {position}", self._described, self.profiled.model.take_profile(),
                _attended(position, self._count), limits,
            )  # fmt: skip
        return rows

    def rates(self, limits: Limits) -> list[Rate]:
        """Tokens a second of every phase."""
        found = []
        for tokens in self._prefills:
            self._prefill(self.profiled, tokens)
            calls = self._calls()
            times = _repeated(lambda n=tokens: self._prefill(self.session, n))  # type: ignore[misc]
            phase = "prefill" if self._decoder else "encode"
            found.append(self._rate(phase, 0, tokens, 1, times, calls, limits))
        if not self._decoder:
            return found
        self._fill(self.session, self._positions[-1])
        decodes = []
        for position in reversed(self._positions):  # stepping back keeps what lies before
            self._fill(self.profiled, position)
            self._calls()
            self._decode(self.profiled, position)
            calls = self._calls()
            times = self._decode(self.session, position)
            decodes.append(
                self._rate("decode", position, self._count, self._count, times, calls, limits)
            )
        return found + decodes[::-1]

    def _rate(
        self,
        phase: str,
        position: int,
        tokens: int,
        parts: int,
        times: Times,
        calls: dict[str, int],
        limits: Limits,
    ) -> Rate:
        """``times`` are of equal parts of ``tokens``, ``parts`` of which make them all."""
        work = total_work(self._described, calls, _attended(position, tokens))
        return Rate(
            phase=phase,
            threads=self.threads,
            position=position,
            tokens=tokens,
            tokens_per_second=tokens / parts / median(times),
            p50_ms=1e3 * median(times),
            p99_ms=1e3 * float(np.quantile(times, 0.99)),
            read_limit=_limit(tokens, work.bytes_read, limits.read_bytes_per_second),
            compute_limit=_limit(tokens, work.multiply_adds, limits.multiply_adds_per_second),
        )

    def _prefill(self, session: Session, tokens: int) -> float:
        """Seconds of one call on an empty context."""
        ids = _tokens(tokens, session.info["vocab_size"])
        if self._decoder:
            session.reset()
        started = time.perf_counter()
        if self._decoder:
            session.eval(ids)
        else:
            session.encode(ids)
        return time.perf_counter() - started

    def _decode(self, session: Session, position: int) -> Times:
        """Seconds of each of the tokens from ``position`` on; what is before them must be there."""
        session.seek(position)
        first = _tokens(1, session.info["vocab_size"])
        times = []
        before = time.perf_counter()
        for _ in session.generate(first, self._count):
            now = time.perf_counter()
            times.append(now - before)
            before = now
        return times

    def _decode_once(self, session: Session, position: int) -> None:
        session.seek(position)
        session.eval(_tokens(1, session.info["vocab_size"]))

    def _fill(self, session: Session, position: int) -> None:
        """Have ``position`` tokens in the context."""
        missing = position - session.position
        if missing > 0:
            session.eval(_tokens(missing, session.info["vocab_size"]))
        session.seek(position)

    def _calls(self) -> dict[str, int]:
        """Calls of each kernel since the last time."""
        return {name: time.calls for name, time in self.profiled.model.take_profile().items()}


def _first_and_full(path: Path, target: str | None) -> tuple[float, int, int]:
    """Milliseconds of a first prompt, its tokens; and what was resident after a full context."""
    before = _resident()
    with load(path, target=target) as session:
        info = session.info
        prompt = min(FIRST_PROMPT, info["context"])
        started = time.perf_counter()
        if info["kind"] == "decoder":
            next(session.generate(_tokens(prompt, info["vocab_size"]), 1))
        else:
            session.encode(_tokens(prompt, info["vocab_size"]))
        milliseconds = 1e3 * (time.perf_counter() - started)
        rest = info["context"] - prompt
        if info["kind"] == "decoder" and rest:
            session.eval(_tokens(rest, info["vocab_size"]))
        elif rest:
            session.encode(_tokens(info["context"], info["vocab_size"]))
        return milliseconds, prompt, _resident() - before


def _attended(position: int, tokens: int) -> float:
    """Positions that ``tokens`` rows from ``position`` on attend to, on average."""
    return position + (tokens + 1) / 2


def _limit(tokens: int, work: float, work_per_second: float) -> float | None:
    return tokens * work_per_second / work if work else None


def _tokens(count: int, vocab_size: int) -> np.ndarray:
    """Token ids; every token costs the same, whatever it is."""
    return (np.arange(count, dtype=np.int32) * 7 + 3) % vocab_size


def _best(action: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPETITIONS):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


def _repeated(measure: Callable[[], float]) -> Times:
    """At least _REPETITIONS results of ``measure``, for at least _LEAST_SECONDS, after one more."""
    measure()
    times: Times = []
    while len(times) < _REPETITIONS or sum(times) < _LEAST_SECONDS:
        times.append(measure())
    return times


def _resident() -> int:
    """Bytes of this process that are in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmRSS")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
