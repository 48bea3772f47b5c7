"""The public call: measures a bundle on a machine, and what the machine would allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from slmtvm.bench.choice import faster_of
from slmtvm.bench.limits import Limits
from slmtvm.bench.machine import LimitSource, LocalMachine, Machine
from slmtvm.bench.on_device import DeviceMachine
from slmtvm.bench.phases import Timed, attended
from slmtvm.bench.report import BenchReport, Rate
from slmtvm.bench.work import kernel_times, total_work
from slmtvm.bundle.read import Bundle
from slmtvm.errors import DeviceError
from slmtvm.rpc.device_bundle import Place, on_device
from slmtvm.runtime.fastest import write_fastest
from slmtvm.runtime.model import gpu_and_cpu

Progress = Callable[[str], None]


def bench(
    bundle: str | Path,
    *,
    threads: Sequence[int] | None = None,
    cores: str | None = None,
    target: str | None = None,
    kernels: bool = True,
    place: Place | None = None,
    progress: Progress = lambda _: None,
) -> BenchReport:
    """Measure ``bundle`` on this machine for each number of ``threads``, 0 being as many as pay; by
    default 1 to that.

    cores: those to compute on, "4-7,9"; the calling thread is bound to them. target: which of the
    bundle's libraries; the best for this machine where None, and where that runs on a GPU, that of
    the CPU as well: the report is the faster one's, which sessions take from then on. kernels:
    whether to measure by kernel as well. place: where to measure it on a device, whose runner has
    the cores. progress: called with the name of each step as it begins. Raises SlmError where the
    bundle cannot run here, or no device is to be had.
    """
    path = Path(bundle)
    if place is None:
        bundle_here = Bundle.open(path)
        both = None if target else gpu_and_cpu(bundle_here)
        if both is not None:
            return _faster(bundle_here, both, threads, cores, kernels, progress)
        return _measured(LocalMachine(path, target, cores), threads, kernels, progress)
    if cores is not None:
        raise DeviceError(
            "the cores of a device are those of its runner (--cores)", where=f"{place.key}"
        )
    with on_device(place, path, target, progress=progress) as there:
        return _measured(DeviceMachine(there), threads, kernels, progress)


def _faster(
    bundle: Bundle,
    both: tuple[str, str],
    threads: Sequence[int] | None,
    cores: str | None,
    kernels: bool,
    progress: Progress,
) -> BenchReport:
    """The report of the faster one of a GPU's library and a CPU's, which is kept; the CPU's where
    the GPU cannot be used."""
    gpu, cpu = both
    try:
        # Its kernels are not timed one by one, nor computed by threads of the CPU.
        machine = LocalMachine(bundle.path, gpu, cores)
        of_gpu = _measured(machine, [1], kernels=False, progress=progress)
    except DeviceError as error:
        progress(f"{gpu} cannot be measured: {error}")
        of_gpu = None
    of_cpu = _measured(LocalMachine(bundle.path, cpu, cores), threads, kernels, progress)
    if of_gpu is None:
        return of_cpu
    found = faster_of(of_gpu, of_cpu)
    write_fastest(bundle, found)
    return replace(of_gpu if found.library == gpu else of_cpu, choice=found.why)


def _measured(
    machine: Machine, threads: Sequence[int] | None, kernels: bool, progress: Progress
) -> BenchReport:
    progress("load")
    opened = machine.open()
    most = int(opened.how["threads"])
    counts = list(dict.fromkeys(n or most for n in threads or range(1, most + 1)))
    info, limits, rates, by_kernel = machine.info, [], [], []
    source: LimitSource | None = None
    for count in counts:
        progress(f"threads {count}: what takes the time")
        with machine.phases(count) as run:
            if source is None:
                working_set = int(run.working_set())
                progress("limits of the machine")
                source = machine.limits(working_set)
            before = source.measure(count)
            profiles = run.profiles() if kernels else []
            progress(f"threads {count}: tokens per second")
            timed = run.timed()
            limit = before.best(source.measure(count))  # others may have used the machine meanwhile
            limits.append(limit)
            for phase in profiles:
                described = info["kernels"]
                by_kernel += kernel_times(phase.name, described, phase.times, phase.attended, limit)
            rates += [_rate(phase, info["kernels"], limit) for phase in timed]
    return BenchReport(
        bundle=machine.bundle.name,
        target=info["target"],
        cpu=machine.cpu,
        cores=opened.how["cores"],
        why=opened.how["why"],
        busy_before=opened.busy,
        busy_during=machine.busy(),
        kind=info["kind"],
        context=info["context"],
        weights_bytes=info["memory"]["weights"],
        load_ms=1e3 * opened.load,
        map_ms=1e3 * opened.map,
        first_token_ms=1e3 * opened.first,
        first_token_prompt=opened.prompt,
        resident_bytes=opened.resident,
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


def _limit(tokens: int, work: float, work_per_second: float) -> float | None:
    return tokens * work_per_second / work if work else None
