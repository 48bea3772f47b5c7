"""How a model is best divided: chunks of a prompt, threads, and what one thread does alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from slmtvm.plan.setup import CHUNKS, DEFAULT_SETUP, Setup
from slmtvm.schedules.templates import KnobChoice
from slmtvm.tuning.compare import Comparer, Phase, Side, phases, prompts
from slmtvm.tuning.confirm import provenance
from slmtvm.tuning.records import RecordFile
from slmtvm.tuning.tasks import Workload
from slmtvm.tuning.whole import SetupRecord

OTHER_CHUNKS = ((1, 8, 64), (1, 32, 256), (1, 16, 64))
OTHER_PARALLEL_BYTES = (8 * 1024, 128 * 1024)


class DivisionSearch:
    """Tries one thing after the other, and goes on from what was faster. ``found``: the records.

    Chunks on ``threads`` threads; what is divided, and over how many threads, on all cores. What
    that says while others use some of these is recorded and not believed.
    """

    def __init__(
        self,
        comparer: Comparer,
        output: RecordFile,
        workload: Workload,
        choose: KnobChoice,
        threads: int = 1,
        cores: int = 1,
        progress: Callable[[SetupRecord], None] = lambda _: None,
    ) -> None:
        self._comparer, self._output, self._workload = comparer, output, workload
        self._choose, self._threads, self._cores = choose, threads, cores
        self._progress = progress
        self._bundles: dict[Setup, Path] = {}
        self.found: list[SetupRecord] = []

    def run(self) -> None:
        """Raises as ``Comparer.compare``; what was found before that is recorded."""
        plan = self._comparer.planner.plan(self._comparer.target, self._choose)
        timed = phases(plan, self._workload)
        best = DEFAULT_SETUP
        if plan.kind != "encoder":
            rows = [r for r in CHUNKS if r <= plan.context]
            others = [c for c in OTHER_CHUNKS if [r for r in c if r <= plan.context] != rows]
            trials = [replace(best, chunks=chunks) for chunks in others]
            best = self._best(best, trials, prompts(plan, self._workload), self._threads)
        if self._cores > 1:
            trials = [replace(best, parallel_bytes=size) for size in OTHER_PARALLEL_BYTES]
            best = self._best(best, trials, timed, 0)
            counts = [2**i for i in range(self._cores.bit_length()) if 2**i < self._cores]
            best = self._best(best, [replace(best, threads=n) for n in counts], timed, 0)
        steps = [r for r in self.found if r.setup == best]
        if steps and all(r.base != DEFAULT_SETUP for r in steps):
            # Steps that gain each may not do so together: a compile takes what beats the default.
            self._compare(DEFAULT_SETUP, best, timed, 0)

    def _best(
        self, base: Setup, trials: Sequence[Setup], timed: Sequence[Phase], threads: int
    ) -> Setup:  # fmt: skip
        """The fastest of ``trials``, ``base`` where none is faster."""
        made = [self._compare(base, setup, timed, threads) for setup in trials]
        faster = [r for r in made if r is not None and r.faster]
        return min(faster, key=lambda r: r.ratio).setup if faster else base

    def _compare(
        self, base: Setup, setup: Setup, timed: Sequence[Phase], threads: int
    ) -> SetupRecord | None:  # fmt: skip
        comparer = self._comparer
        default, other = (Side(self._bundle(s), threads) for s in (base, setup))
        compared = comparer.compare(default, other, timed, f"trying {setup}")
        if compared.failure is not None:
            return None
        record = SetupRecord(
            architecture=comparer.planner.architecture,
            setup=setup,
            provenance=provenance(comparer, threads, compared.device),
            turns=tuple(compared.turns.values()),
            base=base,
            model=comparer.planner.model.source.name,
            busy=compared.busy.others + compared.busy.stolen,
        )
        self._output.append([record])
        self.found.append(record)
        self._progress(record)
        return record

    def _bundle(self, setup: Setup) -> Path:
        if setup not in self._bundles:
            self._bundles[setup] = self._comparer.build(self._choose, setup)
        return self._bundles[setup]
