"""Settings ranked without a device: records of what their code costs."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slmtvm.schedules import isa as isas
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from slmtvm.tuning.gpu_model import GpuModel
from slmtvm.tuning.records import RecordFile
from slmtvm.tuning.static import StaticModel
from slmtvm.tuning.static_record import StaticRecord
from slmtvm.tuning.tasks import TuningTask, Workload, tuning_tasks

SETTINGS = 32
"""Of each kernel, where nothing else is said: compiling takes the time."""
_BATCH = 8


@dataclass(frozen=True)
class Ranked:
    """The best setting of a task by its code, and its part of the default's cost; ``settings`` is
    how many were compared."""

    task: TuningTask
    knobs: Knobs
    ratio: float
    settings: int


@dataclass(frozen=True)
class StaticReport:
    """What ``rank`` found; ``by``: as ``StaticModel`` or ``GpuModel`` has it."""

    by: str
    tasks: tuple[Ranked, ...]
    interrupted: bool = False


def rank(
    model: str | Path,
    target: str | Target = "host",
    *,
    records: str | Path,
    settings: int = SETTINGS,
    workload: Workload | None = None,
    step: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> StaticReport:
    """Rank settings of the kernels of ``model`` for ``target`` by their code alone, or of a GPU by
    a model of it, on this machine whatever the target is, and append what they cost to the file
    ``records``.

    settings: of each kernel at most, drawn evenly from all. options: as ``slmtvm.tune`` takes them.
    KeyboardInterrupt ends it with what it has. Raises SlmError.
    """
    from slmtvm.compiler import plan_model

    resolved = target if isinstance(target, Target) else Target.load(target)
    file = RecordFile(records)
    file.append([])
    plan = plan_model(model, resolved, progress=step, **options)
    judge = StaticModel(resolved) if resolved.cuda is None else GpuModel(resolved)
    found = []
    try:
        for task in tuning_tasks(plan, workload or Workload()):
            step(f"ranking {task.key.label} by {judge.by}")
            found.append(_rank(task, judge, resolved, file, settings))
    except KeyboardInterrupt:
        return StaticReport(judge.by, tuple(found), interrupted=True)
    return StaticReport(judge.by, tuple(found))


def _rank(
    task: TuningTask,
    judge: StaticModel | GpuModel,
    target: Target,
    file: RecordFile,
    most: int,
) -> Ranked:  # fmt: skip
    default, *others = TEMPLATES[task.key.kind].settings(task.key.shape, isas.get(target.isa))
    some = others[:: max(1, -(-len(others) // most))]
    costs: list[float] = []
    for at in range(0, len(some), _BATCH):
        first, *rest = judge.costs(task.key, [default, *some[at : at + _BATCH]])
        costs += [cost / first for cost in rest]
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    versions = {name: version(name) for name in ("slmtvm", "apache-tvm")}
    file.append(
        StaticRecord(task.key, knobs, target.name, target.isa, ratio, judge.by, versions, now)
        for knobs, ratio in zip(some, costs, strict=True)
    )
    best = min(range(len(some)), key=lambda i: costs[i], default=None)
    if best is None or costs[best] >= 1:
        return Ranked(task, default, 1.0, len(some))
    return Ranked(task, some[best], costs[best], len(some))
