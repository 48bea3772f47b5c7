"""The last word on what was measured of kernels alone: is the whole model faster with it?"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.tuning.choice import Chosen, RecordedChoice
from slmtvm.tuning.compare import Compared, Comparer, Phase, Side, in_rounds, phases, tasks_of
from slmtvm.tuning.records import RecordFile, RecordLog
from slmtvm.tuning.tasks import TaskKey, Workload
from slmtvm.tuning.whole import Confirmation, Provenance, Turns

Settings = tuple[tuple[TaskKey, Knobs], ...]


class Confirmer:
    """Compares a model with tuned kernels and with the defaults, and records what came out.

    The kernels of a phase first all together. Where the phase is not faster so, those of each
    family by themselves, since one that loses hides what others gain; then those families together
    that were faster. ``found`` are the records.
    """

    def __init__(
        self,
        comparer: Comparer,
        output: RecordFile,
        workload: Workload,
        threads: int = 1,
        progress: Callable[[Confirmation], None] = lambda _: None,
    ) -> None:
        self._comparer, self._output = comparer, output
        self._workload, self._threads, self._progress = workload, threads, progress
        self.found: list[Confirmation] = []

    def run(self, log: RecordLog) -> None:
        """Compare what ``log`` promises and no whole model has confirmed yet. Raises as
        ``Comparer.compare``; what was found before that is recorded."""
        target = self._comparer.target
        choice = RecordedChoice(log, target, trial=True)
        plan = self._comparer.planner.plan(target, choice)
        timed = phases(plan, self._workload)
        parts: dict[Phase, list[Chosen]] = {}
        taken: set[TaskKey] = set()
        for phase in timed[::-1]:  # what a prompt and an answer call is the answer's
            keys = tasks_of(plan, phase) - taken
            chosen = [c for c in choice.used if c.key in keys]
            taken |= keys
            if any(not _known(log, target.name, c) for c in chosen):
                parts[phase] = chosen
        if not parts:
            return
        default = Side(self._comparer.build(), self._threads)
        lost = self._try(
            default, {p: (f"{p.name}, all kernels", _settings(c)) for p, c in parts.items()}
        )
        families = {p: _families(p, parts[p]) for p in lost}
        several = {p: f for p, f in families.items() if len(f) > 1}
        won: dict[Phase, list[Confirmation]] = defaultdict(list)
        for together in in_rounds([[(p, f) for f in fs] for p, fs in several.items()]):
            missed = self._try(default, dict(together))
            for phase, _ in together:
                if phase not in missed:
                    won[phase].append(self._last(phase))
        both = {p: found for p, found in won.items() if len(found) > 1}
        if both:
            self._together(default, both)

    def _together(self, default: Side, won: Mapping[Phase, list[Confirmation]]) -> None:
        """What was faster by itself may not be so together: then the best of it is kept."""
        trial = {
            p: (f"{p.name}, what was confirmed", tuple(s for c in found for s in c.settings))
            for p, found in won.items()
        }
        for phase in self._try(default, trial):
            best = min(won[phase], key=_ratio)
            self._note([best])

    def _try(
        self, default: Side, trial: Mapping[Phase, tuple[str, Settings]]
    ) -> list[Phase]:  # fmt: skip
        """Compare one bundle with the settings of all of ``trial``, phases being independent of
        each other; the phases that were not faster."""
        knobs = {key.text: k for _, settings in trial.values() for key, k in settings}
        other = Side(self._comparer.build(_Given(knobs)), self._threads)
        what = "; ".join(name for name, _ in trial.values())
        compared = self._comparer.compare(default, other, list(trial), f"confirming {what}")
        self._note(
            [
                self._confirmation(family, settings, compared, compared.turns.get(phase.name))
                for phase, (family, settings) in trial.items()
            ]
        )
        return [p for p, c in zip(trial, self.found[-len(trial) :], strict=True) if not c.confirmed]

    def _last(self, phase: Phase) -> Confirmation:
        return next(
            c for c in reversed(self.found) if c.turns is not None and c.turns.phase == phase.name
        )

    def _note(self, confirmations: Sequence[Confirmation]) -> None:
        self._output.append(confirmations)
        for confirmation in confirmations:
            self.found.append(confirmation)
            self._progress(confirmation)

    def _confirmation(
        self, family: str, settings: Settings, compared: Compared, turns: Turns | None
    ) -> Confirmation:  # fmt: skip
        comparer = self._comparer
        return Confirmation(
            settings=settings,
            provenance=provenance(comparer, self._threads, compared.device),
            family=family,
            model=comparer.planner.model.source.name,
            turns=turns,
            failure=compared.failure,
        )


class _Given:
    """Chooses given knobs, the defaults for what there are none of."""

    def __init__(self, knobs: Mapping[str, Knobs]) -> None:
        self._knobs = knobs

    def __call__(self, kind: str, shape: Any, isa: Isa) -> Knobs:
        given = self._knobs.get(TaskKey(kind, shape).text)
        return TEMPLATES[kind].default_knobs(shape, isa) if given is None else given


def provenance(comparer: Comparer, threads: int, device: Mapping[str, Any]) -> Provenance:
    """Of what is measured now."""
    return Provenance(
        comparer.target.name,
        comparer.target.isa,
        threads,
        device,
        {name: version(name) for name in ("slmtvm", "apache-tvm")},
        datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _known(log: RecordLog, target: str, chosen: Chosen) -> bool:
    """Whether a whole model has confirmed this very setting."""
    pair = (chosen.key, chosen.knobs)
    last = [
        c for c in log.confirmations if c.provenance.target == target and pair in c.settings
    ][-1:]  # fmt: skip
    return any(c.confirmed for c in last)


def _settings(chosen: Sequence[Chosen]) -> Settings:
    return tuple((c.key, c.knobs) for c in chosen)


def _families(phase: Phase, chosen: Sequence[Chosen]) -> list[tuple[str, Settings]]:
    """The settings of a phase by what their kernels have in common."""
    found: dict[str, list[Chosen]] = defaultdict(list)
    for one in chosen:
        shape = one.key.shape
        layer = getattr(shape, "layer", shape)
        kind = getattr(layer, "format", None) or getattr(layer, "kv_dtype", "")
        found[f"{phase.name}, {one.key.kind} {kind}"].append(one)
    return [(family, _settings(members)) for family, members in sorted(found.items())]


def _ratio(confirmation: Confirmation) -> float:
    return confirmation.turns.ratio if confirmation.turns else float("inf")
