"""The public call: tunes the kernels of a model on a device, and keeps what it finds."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from slmtvm.bench.limits import Limits
from slmtvm.plan.model import Plan
from slmtvm.schedules import isa as isas
from slmtvm.target import Target
from slmtvm.tuning.cost_model import CostModel
from slmtvm.tuning.features import features
from slmtvm.tuning.measuring import Batch, Measurement, Measurer
from slmtvm.tuning.records import Record, RecordFile
from slmtvm.tuning.search import TaskSearch
from slmtvm.tuning.static import StaticModel
from slmtvm.tuning.tasks import (
    TaskKey,
    TuningTask,
    Workload,
    setting_of,
    tuning_tasks,
    working_set,
)
from slmtvm.tuning.whole import Confirmation, SetupRecord

BATCH = 8
_ELSEWHERE = 0.3
"""The weight of what was measured on another target of the same instruction set."""
_CONFIRM_ROUNDS = 25
"""Of the best settings in the end: the best of many is often the luckiest."""
_CONFIRMED = 3


@dataclass(frozen=True)
class Budget:
    """When to stop: after so many trials or minutes, whichever comes first; None for no bound."""

    trials: int | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """A task after tuning: its share of the time of all tasks with default knobs, the best setting
    and its ratio of the default's time; ``of_limit`` is what the best reaches of the device's
    limits, None where they are not known."""

    key: TaskKey
    share: float
    trials: int
    space: int
    knobs: dict[str, int]
    ratio: float
    default_seconds: float
    multiply_adds: int
    weight_bytes: int
    of_limit: float | None = None


@dataclass(frozen=True)
class Progress:
    """Where tuning stands: ``gain`` is the estimated speed-up of all tasks together; ``best`` the
    ratio of the last task's best setting, ``of_limit`` what that reaches of the device's limits."""

    trials: int
    task: str
    best: float
    gain: float
    seconds: float
    of_limit: float | None = None


@dataclass(frozen=True)
class TuneReport:
    """What a run of the tuner found; ``interrupted`` where the user ended it. ``confirmations`` and
    ``setups`` are what whole models said."""

    tasks: tuple[TaskResult, ...]
    trials: int
    failures: int
    interrupted: bool
    confirmations: tuple[Confirmation, ...] = ()
    setups: tuple[SetupRecord, ...] = ()

    @property
    def gain(self) -> float:
        """The estimated speed-up of all tasks together."""
        return 1 / max(sum(t.share * t.ratio for t in self.tasks), 1e-9) if self.tasks else 1.0


def tune_plan(
    plan: Plan,
    target: Target,
    measurer: Measurer,
    output: RecordFile,
    *,
    known: Iterable[Record] = (),
    budget: Budget = Budget(),
    workload: Workload = Workload(),  # noqa: B008
    threads: int = 1,
    limits: Limits | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    judge: StaticModel | None = None,
) -> TuneReport:
    """Search the knobs of every kernel of ``plan`` that has any; every measurement is appended to
    ``output`` before the next batch is built.

    known: earlier records; those of the same tasks on this target are not measured again, the
    others are what the cost model begins with. limits: of the device, which settings are compared
    with. judge: what it ranks worse of twice as many settings is not measured. KeyboardInterrupt
    ends the search, and what was measured is kept.
    """
    run = _Tuner(plan, target, measurer, output, workload, threads, limits, progress, judge)
    run.learn(known)
    interrupted = False
    try:
        run.search(budget)
    except KeyboardInterrupt:
        interrupted = True
    return run.report(interrupted)


class _Tuner:
    def __init__(
        self,
        plan: Plan,
        target: Target,
        measurer: Measurer,
        output: RecordFile,
        workload: Workload,
        threads: int,
        limits: Limits | None,
        progress: Callable[[Progress], None],
        judge: StaticModel | None,
    ) -> None:
        self._judge = judge
        self._limits = limits
        self._target, self._measurer, self._output = target, measurer, output
        self._threads, self._progress = threads, progress
        self._isa = isas.get(target.isa)
        self._working_set = working_set(plan)
        self._models: dict[str, CostModel] = {}
        tasks = tuning_tasks(plan, workload)
        self._searches = [TaskSearch(task, self._isa, self._model(task.key.kind)) for task in tasks]
        self._own: dict[tuple[str, tuple[tuple[str, int], ...]], list[float]] = {}
        self._started = time.monotonic()
        self._trials = self._failures = 0

    def _model(self, kind: str) -> CostModel:
        return self._models.setdefault(kind, CostModel())

    def learn(self, known: Iterable[Record]) -> None:
        """Take over earlier records."""
        tasks = {search.task.key.text: search for search in self._searches}
        for record in known:
            if record.isa != self._isa.name or record.key.kind not in self._models:
                continue
            search = tasks.get(record.key.text)
            here = record.target == self._target.name and record.threads == self._threads
            if search is not None and here:
                search.resume([record])
                self._remember(record)
            elif record.ratios:
                row = features(record.key.kind, record.key.shape, self._isa, record.knobs)
                weight = 1.0 if record.target == self._target.name else _ELSEWHERE
                self._model(record.key.kind).add(row, record.ratio, weight)

    def search(self, budget: Budget) -> None:
        """Batch after batch of the task where most is to be gained, then the best once more."""
        self._started = time.monotonic()
        while not self._spent(budget):
            search = max(self._searches, key=self._worth, default=None)
            if search is None or not self._worth(search):
                break
            count = BATCH
            if budget.trials is not None:
                count = min(count, budget.trials - self._trials)
            self._measure(search, self._proposed(search, count), rounds=7)
        for search in self._searches:
            self._confirm(search)

    def _proposed(self, search: TaskSearch, count: int) -> list[dict[str, int]]:
        """The next settings to measure; with a static model, the better half by that of twice as
        many. Of a single row code says nothing."""
        if self._judge is None or search.task.key.shape.m == 1:
            return search.propose(count)
        settings = search.propose(2 * count)
        costs = self._judge.costs(search.task.key, settings) if settings else []
        order = sorted(range(len(settings)), key=lambda i: costs[i])
        search.leave_out(settings[i] for i in order[count:])
        return [settings[i] for i in order[:count]]

    def report(self, interrupted: bool) -> TuneReport:
        total = sum(self._seconds(s) for s in self._searches) or 1.0
        tasks = [
            TaskResult(
                key=s.task.key,
                share=self._seconds(s) / total,
                trials=s.trials,
                space=s.space_size,
                knobs=s.best[0],
                ratio=s.best[1],
                default_seconds=self._seconds(s) / s.task.calls,
                multiply_adds=s.task.work.multiply_adds,
                weight_bytes=s.task.work.weight_bytes,
                of_limit=self._of_limit(s),
            )
            for s in self._searches
        ]
        tasks.sort(key=lambda t: -t.share)
        return TuneReport(tuple(tasks), self._trials, self._failures, interrupted)

    def _spent(self, budget: Budget) -> bool:
        if budget.trials is not None and self._trials >= budget.trials:
            return True
        minutes = (time.monotonic() - self._started) / 60
        return budget.minutes is not None and minutes >= budget.minutes

    def _seconds(self, search: TaskSearch) -> float:
        """The task's time in the workload with default knobs: measured, or estimated at first."""
        each = search.default_seconds or _estimate(search.task)
        return each * search.task.calls

    def _of_limit(self, search: TaskSearch) -> float | None:
        """The part of the device's limits that the best setting reaches, where that is known."""
        if self._limits is None or not search.default_seconds:
            return None
        least = self._limits.seconds(*_work(search.task))
        return least / (search.default_seconds * search.best[1])

    def _worth(self, search: TaskSearch) -> float:
        return self._seconds(search) * search.expected_gain()

    def _measure(
        self,
        search: TaskSearch,
        settings: Sequence[dict[str, int]],
        rounds: int,
        new: bool = True,
    ) -> None:
        if not settings:
            return
        task = search.task
        batch = Batch(
            task.key, settings, task.situation, self._working_set, self._threads, rounds
        )  # fmt: skip
        measured = self._measurer.measure(batch)
        records = [self._record(task.key, m) for m in measured]
        self._output.append(records)
        for record in records:
            self._remember(record)
        if new:
            self._trials += len(measured)
            self._failures += sum(m.failure is not None for m in measured)
        search.update(measured)
        total = sum(self._seconds(s) for s in self._searches) or 1.0
        tuned = sum(self._seconds(s) * s.best[1] for s in self._searches)
        self._progress(
            Progress(
                self._trials, task.key.label, search.best[1], total / tuned,
                time.monotonic() - self._started, self._of_limit(search),
            )
        )  # fmt: skip

    def _confirm(self, search: TaskSearch) -> None:
        """Measure the best settings of a task once more, and longer; judge by all rounds."""
        found = {
            setting: ratios
            for (text, setting), ratios in self._own.items()
            if text == search.task.key.text and _median(ratios) < 1
        }
        if not found:
            return
        best = sorted(found, key=lambda s: _median(found[s]))[:_CONFIRMED]
        self._measure(search, [dict(s) for s in best], _CONFIRM_ROUNDS, new=False)
        judged = {s: _median(self._own[search.task.key.text, s]) for s in best}
        setting = min(judged, key=lambda s: judged[s])
        if judged[setting] < 1:
            search.best = (dict(setting), judged[setting])

    def _record(self, key: TaskKey, m: Measurement) -> Record:
        return Record(
            key=key,
            knobs=dict(m.knobs),
            target=self._target.name,
            isa=self._isa.name,
            seconds=m.seconds,
            default_seconds=m.default_seconds,
            failure=m.failure,
            threads=self._threads,
            working_set=self._working_set,
            device=m.device,
            versions={name: version(name) for name in ("slmtvm", "apache-tvm")},
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )

    def _remember(self, record: Record) -> None:
        if record.failure is None:
            key = record.key.text, setting_of(record.knobs)
            self._own.setdefault(key, []).extend(record.ratios)


def _estimate(task: TuningTask) -> float:
    """Seconds of a call, roughly: what to begin with is all that depends on it."""
    read, multiply = 10e9, 50e9  # a second, of a core
    moved, products = _work(task)
    return max(moved / read, products / multiply, 1e-7)


def _work(task: TuningTask) -> tuple[float, float]:
    """Bytes of weights and KV cache that a call reads, and its multiply-adds."""
    work, attended = task.work, task.situation.position
    return (
        work.weight_bytes + work.context_bytes * attended,
        work.multiply_adds + work.context_multiply_adds * attended,
    )


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
