"""The search of one task: which settings to measure next, and when to stop."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.tuning.cost_model import CostModel
from slmtvm.tuning.features import features
from slmtvm.tuning.measuring import Measurement
from slmtvm.tuning.records import Record
from slmtvm.tuning.tasks import Setting, TuningTask, setting_of

_AT_RANDOM = 0.125
"""Of a batch: for the model to learn of what it does not expect."""
_STALE_BATCHES = 3
"""Batches without gain after which a task is done."""
_LEAST_GAIN = 0.01
"""What counts as one."""
_POOL = 4
"""The batch is picked, far apart from each other, from so many times as many of the best."""


class TaskSearch:
    """Settings of one task in the order in which they are worth a measurement.

    ``best`` is the best measured setting and its ratio of the default's time, the default at first.
    """

    def __init__(self, task: TuningTask, isa: Isa, model: CostModel, seed: int = 0) -> None:
        self.task, self._model = task, model
        key = task.key
        template = TEMPLATES[key.kind]
        default, *others = template.settings(key.shape, isa)
        self.best: tuple[Knobs, float] = (default, 1.0)
        self.space_size = len(others) + 1
        self.trials = 0
        self.stale = 0
        self.default_seconds: float | None = None
        # What all others are measured against is known without a measurement.
        model.add(features(key.kind, key.shape, isa, default), 1.0)
        self._open: dict[Setting, Knobs] = {setting_of(k): k for k in others}
        self._rows = {s: features(key.kind, key.shape, isa, k) for s, k in self._open.items()}
        self._random = random.Random(f"{seed} {key.text}")

    @property
    def done(self) -> bool:
        """Whether more measurements are not expected to gain anything."""
        return not self._open or self.stale >= _STALE_BATCHES

    def resume(self, records: Iterable[Record]) -> None:
        """Take what was measured of this very task before; it is not measured again."""
        for record in records:
            if record.default_seconds:
                self.default_seconds = float(np.median(record.default_seconds))
            self._note(record.knobs, record.ratio)

    def propose(self, count: int) -> list[Knobs]:
        """The next settings to measure, ``count`` at most."""
        settings = list(self._open)
        if not settings:
            return []
        predicted = self._model.predict([self._rows[s] for s in settings])
        # Equal predictions, all of them at first, in no order.
        order = sorted(
            range(len(settings)), key=lambda i: (-predicted[i], self._random.random())
        )  # fmt: skip
        best = [settings[i] for i in order[: _POOL * count]]
        picked = self._far_apart(best, count - round(_AT_RANDOM * count))
        left = [s for s in settings if s not in picked]
        picked += self._random.sample(left, min(count - len(picked), len(left)))
        return [self._open[s] for s in picked]

    def leave_out(self, settings: Iterable[Knobs]) -> None:
        """These are not worth a measurement."""
        for knobs in settings:
            self._open.pop(setting_of(knobs), None)

    def update(self, measurements: Sequence[Measurement]) -> None:
        """Learn from a batch that was proposed."""
        before = self.best[1]
        for m in measurements:
            ratios = [a / b for a, b in zip(m.seconds, m.default_seconds, strict=True)]
            if m.default_seconds:
                self.default_seconds = float(np.median(m.default_seconds))
            self._note(m.knobs, float(np.median(ratios)) if ratios else float("inf"))
        self.stale = 0 if self.best[1] < before * (1 - _LEAST_GAIN) else self.stale + 1

    def expected_gain(self) -> float:
        """What the next batch may take off the task's time, as a part of it.

        What the model expects of the best setting left, but at least a little, which halves with
        every batch that brought nothing.
        """
        if self.done:
            return 0.0
        settings = list(self._open)
        predicted = float(np.exp(-self._model.predict([self._rows[s] for s in settings]).max()))
        return max(self.best[1] - predicted, 0.05 * self.best[1]) * 0.5**self.stale

    def _note(self, knobs: Knobs, ratio: float) -> None:
        setting = setting_of(knobs)
        if setting not in self._open:
            return
        del self._open[setting]
        self.trials += 1
        self._model.add(self._rows[setting], ratio)
        if ratio < self.best[1]:
            self.best = (knobs, ratio)

    def _far_apart(self, best: list[Setting], count: int) -> list[Setting]:
        """``count`` of ``best``: the first, then those with the most knobs unlike all before."""
        picked: list[Setting] = []
        nearest = dict.fromkeys(best, len(best[0]) if best else 0)  # to those picked, by knobs
        while nearest and len(picked) < count:
            chosen = max(nearest, key=lambda s: nearest[s])  # the first of equal ones
            del nearest[chosen]
            picked.append(chosen)
            for setting, distance in nearest.items():
                nearest[setting] = min(distance, _unlike(setting, chosen))
        return picked


def _unlike(a: Setting, b: Setting) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))
