"""The public call: tunes the kernels of an ONNX file for one target."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slmtvm.bench.limits import LimitProbe, Limits
from slmtvm.cluster import connected
from slmtvm.errors import SlmError, TargetError
from slmtvm.host import cpu_features, cpu_name, cpuinfo, runs_here
from slmtvm.rpc.client import Device
from slmtvm.rpc.local import local_device
from slmtvm.target import Target
from slmtvm.tuning.building import build_on
from slmtvm.tuning.choice import RecordedChoice
from slmtvm.tuning.compare import MOST_TURNS, Comparer
from slmtvm.tuning.confirm import Confirmer
from slmtvm.tuning.cost_model import import_xgboost
from slmtvm.tuning.devices import DeviceMeasurer
from slmtvm.tuning.division import DivisionSearch
from slmtvm.tuning.local import LocalRunner
from slmtvm.tuning.measuring import ProgramMeasurer
from slmtvm.tuning.records import RecordFile, read_log, read_records
from slmtvm.tuning.static import StaticModel
from slmtvm.tuning.tasks import Workload, working_set
from slmtvm.tuning.tuner import Budget, Progress, TuneReport, tune_plan
from slmtvm.tuning.whole import Confirmation, SetupRecord


def tune(
    model: str | Path,
    target: str | Target = "host",
    *,
    records: str | Path,
    trials: int | None = None,
    minutes: float | None = None,
    resume: bool = False,
    start_from: Sequence[str | Path] = (),
    threads: int = 1,
    workload: Workload | None = None,
    tracker: str | None = None,
    key: str | None = None,
    tls: Path | None = None,
    confirm: bool = True,
    turns: int = MOST_TURNS,
    static_filter: bool = False,
    cluster: str | None = None,
    step: Callable[[str], None] = lambda _: None,
    progress: Callable[[Progress], None] = lambda _: None,
    said: Callable[[Confirmation | SetupRecord], None] = lambda _: None,
    **options: Any,
) -> TuneReport:
    """Search the fastest knobs of the kernels of ``model`` for ``target``, and append every
    measurement to the file ``records``, which ``slmtvm.compile`` takes.

    trials, minutes: when to stop at the latest; where both are None, when nothing more is to be
    gained. resume: do not measure again what ``records`` holds. start_from: files of other records,
    of other models or relatives of the target, that the cost model is trained on first. threads:
    how many compute each kernel. tracker, key: measure on all devices that the tracker "host:port"
    has under the key, by default the target's name; this machine measures where there is no
    tracker. tls: folder of the tuner's keys. confirm: compare the whole
    model as tuned with the default, in so many ``turns`` at most, after ``minutes`` are over;
    then try other chunks, and what several threads compute (not on a GPU: programs that compare
    whole models are static, and find no driver). static_filter: rank twice as many
    settings by their code as are measured, and leave the worse half out.
    cluster: a Ray cluster, "ray://HOST:PORT", that builds what the devices of a tracker measure.
    options: as
    ``slmtvm.compile`` takes them: context, source_context, kv, activations, mask, encoder, outputs.
    step: called with the name of each step before measuring, progress after each batch, said with
    each record of a whole model.

    KeyboardInterrupt while it measures ends it with what it has. Raises SlmError, TargetError where
    this machine is to measure what it cannot run.
    """
    from slmtvm.compiler import model_planner

    import_xgboost()  # before the work that takes long
    resolved = target if isinstance(target, Target) else Target.load(target)
    file = RecordFile(records)
    known = [r for path in start_from for r in read_records(path)]
    if resume and file.path.exists():
        known += read_records(file.path)
    file.append([])  # where it cannot be written, that is known now
    if resolved.cuda is not None:
        _check_gpu(resolved, threads, static_filter=static_filter)
    if cluster and tracker is None:
        raise SlmError("builds for the devices of a tracker: name one", where="cluster")
    with ExitStack() as stack:
        measurer: LocalMeasurer | DeviceMeasurer
        if tracker is None:
            measurer = local_measurer(resolved, step)
        else:
            measurer = stack.enter_context(
                DeviceMeasurer(
                    resolved,
                    tracker,
                    key or resolved.name,
                    tls=tls,
                    progress=step,
                    builder=build_on(stack.enter_context(connected(cluster))) if cluster else None,
                )
            )
        planner = model_planner(model, progress=step, **options)
        step(f"kernels for {resolved.name}")
        plan = planner.plan(resolved)
        limits = None
        if resolved.cuda is None:  # what is read and multiplied there is a CPU's
            step("limits of the device")
            limits = measurer.limits(working_set(plan), threads)
        work = workload or Workload()
        report = tune_plan(
            plan, resolved, measurer, file,
            known=known, budget=Budget(trials, minutes), workload=work,
            threads=threads, limits=limits, progress=progress,
            judge=StaticModel(resolved) if static_filter else None,
        )  # fmt: skip
        if not confirm or report.interrupted or resolved.cuda is not None:
            return report
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="slmtvm-confirm-")))
        comparer = Comparer(planner, resolved, measurer, folder, step, turns)
        return _ask_the_model(report, comparer, file, work, threads, said)


def _check_gpu(target: Target, threads: int, *, static_filter: bool) -> None:
    """Raises TargetError where more is asked for than is done on a GPU."""
    if threads != 1:
        raise TargetError(
            f"a GPU computes, {threads} threads do not: leave that out", where=target.name
        )
    if static_filter:
        raise TargetError(
            "the code of a GPU's kernels cannot be ranked: leave the static filter out",
            where=target.name,
        )


def _ask_the_model(
    report: TuneReport,
    comparer: Comparer,
    file: RecordFile,
    workload: Workload,
    threads: int,
    said: Callable[[Confirmation | SetupRecord], None],
) -> TuneReport:
    """``report`` with what whole models said of it; KeyboardInterrupt ends that with what there
    is."""
    confirmer = Confirmer(comparer, file, workload, threads, said)
    divisions: list[SetupRecord] = []
    interrupted = False
    try:
        confirmer.run(read_log(file.path))
        with comparer.devices.device() as device:
            cores = len(device.info()["cores"])
        choice = RecordedChoice(read_log(file.path), comparer.target)
        search = DivisionSearch(comparer, file, workload, choice, threads, cores, said)
        divisions = search.found
        search.run()
    except KeyboardInterrupt:
        interrupted = True
    return replace(
        report,
        interrupted=interrupted,
        confirmations=tuple(confirmer.found),
        setups=tuple(divisions),
    )


class LocalMeasurer(ProgramMeasurer):
    """Measures on this machine."""

    def __init__(self, target: Target, progress: Callable[[str], None]) -> None:
        runner = LocalRunner(gpu=target.cuda is not None)
        super().__init__(target, runner, this_machine(), progress)
        self._limited = target

    @contextmanager
    def device(self) -> Iterator[Device]:
        """This machine behind a runner, for programs of whole models."""
        with local_device() as device:
            yield device

    def limits(self, working_set: int, threads: int) -> Limits:
        """What this machine allows where ``working_set`` bytes are read again and again."""
        return LimitProbe(self._limited, working_set).measure(threads)


def local_measurer(
    target: Target, progress: Callable[[str], None] = lambda _: None
) -> LocalMeasurer:
    """Measures on this machine; TargetError where it cannot run ``target``."""
    if not runs_here(target.arch, target.requires):
        raise TargetError(
            f"this machine's CPU cannot run it: measure on a device that can, or tune for "
            f"host ({Target.load('host').name})",
            where=target.name,
        )
    return LocalMeasurer(target, progress)


def this_machine() -> dict[str, Any]:
    """What records say of this machine."""
    features = cpu_features(cpuinfo())
    known = {"v", "avx2", "avx512f", "avx512_vnni", "asimd", "asimddp"}
    return {
        "cpu": cpu_name(),
        "machine": platform.machine(),
        "features": sorted(features & known),
        "cores": len(os.sched_getaffinity(0)),
    }
