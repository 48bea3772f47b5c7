"""The public call: opens a bundle, measures it, and what the machine would allow."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from slmtvm.bench.busy import Watch, watch_for
from slmtvm.bench.limits import LimitProbe, Limits
from slmtvm.bench.phases import (
    REPETITIONS,
    Phases,
    Timed,
    attended,
    read_source,
    some_tokens,
)
from slmtvm.bench.report import BenchReport, Rate
from slmtvm.bench.work import kernel_times, total_work
from slmtvm.runtime import load
from slmtvm.target import Target, known_targets

FIRST_PROMPT = 16
_IDLE_SECONDS = 0.2  # in which the machine is watched before it is measured

Progress = Callable[[str], None]


def bench(
    bundle: str | Path,
    *,
    threads: Sequence[int] | None = None,
    cores: str | None = None,
    target: str | None = None,
    kernels: bool = True,
    progress: Progress = lambda _: None,
) -> BenchReport:
    """Measure ``bundle`` on this machine for each number of ``threads``, 0 being as many as pay; by
    default 1 to that.

    cores: those to compute on, "4-7,9"; the calling thread is bound to them. target: which of the
    bundle's libraries; the best for this machine where None. kernels: whether to measure by kernel
    as well. progress: called with the name of each step as it begins. Raises SlmError where the
    bundle cannot run here.
    """
    path = Path(bundle)
    progress("load")
    with load(path, threads=0, cores=cores, target=target) as session:
        how = session.how
    counts = list(
        dict.fromkeys(n or how["threads"] for n in threads or range(1, how["threads"] + 1))
    )
    progress("what else this machine does")
    before_all, during = watch_for(_IDLE_SECONDS), Watch()
    load_ms = 1e3 * _best(lambda: load(path, target=target).close())
    map_ms = 1e3 * _best(lambda: load(path, target=target, check=False).close())
    first_ms, prompt, resident = _first_and_full(path, target)
    limits, rates, by_kernel = [], [], []
    probe: LimitProbe | None = None
    for count in counts:
        progress(f"threads {count}: what takes the time")
        with Phases(path, target, count, cores) as run:
            info = run.session.info
            if probe is None:
                working_set = int(run.working_set())
                progress("limits of this machine")
                probe = LimitProbe(_target(info["target"]), working_set)
            before = probe.measure(count)
            profiles = run.profiles() if kernels else []
            progress(f"threads {count}: tokens per second")
            timed = run.timed()
            limit = before.best(probe.measure(count))  # others may have used the machine meanwhile
            limits.append(limit)
            for phase in profiles:
                described = info["kernels"]
                by_kernel += kernel_times(phase.name, described, phase.times, phase.attended, limit)
            rates += [_rate(phase, info["kernels"], limit) for phase in timed]
    return BenchReport(
        bundle=path.name,
        target=info["target"],
        cpu=cpu_name(),
        cores=how["cores"],
        why=how["why"],
        busy_before=before_all,
        busy_during=during.read(),
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
        kernels=tuple(by_kernel),
    )


def _rate(timed: Timed, described: Sequence[Mapping[str, Any]], limits: Limits) -> Rate:
    work = total_work(described, timed.calls, attended(timed.position, timed.tokens))
    middle = median(timed.times)
    return Rate(
        phase=timed.phase,
        threads=timed.threads,
        position=timed.position,
        tokens=timed.tokens,
        tokens_per_second=timed.tokens / timed.parts / middle,
        p50_ms=1e3 * middle,
        p99_ms=1e3 * float(np.quantile(timed.times, 0.99)),
        read_limit=_limit(timed.tokens, work.bytes_read, limits.read_bytes_per_second),
        compute_limit=_limit(timed.tokens, work.multiply_adds, limits.multiply_adds_per_second),
    )


def _target(name: str) -> Target:
    """The target whose instructions reach the limits; the host's for one of somebody's own."""
    return Target.load(name if name in known_targets() else "host")


def _first_and_full(path: Path, target: str | None) -> tuple[float, int, int]:
    """Milliseconds of a first prompt, its tokens; and what was resident after a full context."""
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
        milliseconds = 1e3 * (time.perf_counter() - started)
        rest = info["context"] - prompt
        if info["kind"] != "encoder" and rest:
            session.eval(some_tokens(rest, info))
        elif rest:
            session.encode(some_tokens(info["context"], info))
        return milliseconds, prompt, _resident() - before


def _limit(tokens: int, work: float, work_per_second: float) -> float | None:
    return tokens * work_per_second / work if work else None


def _best(action: Callable[[], object]) -> float:
    times = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


def _resident() -> int:
    """Bytes of this process that are in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmRSS")


def cpu_name() -> str:
    """The name of this machine's CPU."""
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
