"""From records to the knobs of a compile: the best that was measured, else the nearest's."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from slmtvm.tuning.records import Record
from slmtvm.tuning.tasks import TaskKey

SIZES = ("m", "n", "k", "capacity", "ring", "table_rows")
_MOST_DISTANCE = 2.0
"""Shapes whose sizes differ by more than this, in powers of two all together, are not near."""
_CLEAR_GAIN = 0.97
"""Of the default's time: what a setting must reach for shapes near by to take it."""
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Chosen:
    """How the knobs of one task were chosen: ``origin`` is "record" or "nearest", and ``of`` then
    the task that was measured; ``ratio`` of the default's time."""

    key: TaskKey
    knobs: Knobs
    origin: str
    of: TaskKey
    ratio: float

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.key.label,
            "knobs": self.knobs,
            "origin": self.origin,
            "of": self.of.label,
            "ratio": round(self.ratio, 4),
        }


class RecordedChoice:
    """Chooses the knobs of one target's kernels from ``records``; ``used`` says which it did.

    A setting counts as faster where three of four of its rounds are faster than the default's in
    the same round, all records of it taken together.
    """

    def __init__(self, records: Iterable[Record], target: Target) -> None:
        self.used: list[Chosen] = []
        own = (r for r in records if r.target == target.name and r.isa == target.isa)
        self._measured = _by_task(own)

    def __call__(self, kind: str, shape: Any, isa: Isa) -> Knobs:
        key, default = TaskKey(kind, shape), TEMPLATES[kind].default_knobs(shape, isa)
        chosen = _best(self._measured.get(key.text, []), key, isa) or self._of_a_near_shape(
            key, isa
        )
        if chosen is None:
            return default
        if all(other.key != key for other in self.used):
            self.used.append(chosen)
        return chosen.knobs

    def _of_a_near_shape(self, key: TaskKey, isa: Isa) -> Chosen | None:
        """The best of the nearest shape; None where the shape's own default is known to be best."""
        tasks = self._measured
        if key.text in tasks:
            return None
        near = sorted(
            (distance, text)
            for text, records in tasks.items()
            if (distance := shape_distance(key, records[0].key)) <= _MOST_DISTANCE
        )
        for _, text in near:
            found = _best(tasks[text], key, isa, _CLEAR_GAIN)
            if found is not None:
                return found
        return None


def shape_distance(a: TaskKey, b: TaskKey) -> float:
    """How many powers of two the sizes of two tasks differ by; infinite where anything else does.

    A single row and several are different things; a bias and a residual are none.
    """
    if a.kind != b.kind or (a.shape.m == 1) != (b.shape.m == 1):
        return math.inf
    first, second = _fields(a.shape), _fields(b.shape)
    for name in first:
        if name not in (*SIZES, "has_bias", "has_residual") and first[name] != second[name]:
            return math.inf
    pairs = [(first[s], second[s]) for s in SIZES if first.get(s) and second.get(s)]
    return sum(abs(math.log2(a / b)) for a, b in pairs)


def _fields(shape: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(shape)
    layer = fields.pop("layer", {})
    return {**layer, **fields}


def _by_task(records: Iterable[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[record.key.text].append(record)
    return found


def _best(
    records: list[Record], key: TaskKey, isa: Isa, clear: float = 1.0
) -> Chosen | None:  # fmt: skip
    """The setting of ``records`` with the least ratio that is surely faster than the default.

    Settings that fail anywhere, or that kernels of ``key`` do not have, are left out.
    """
    template = TEMPLATES[key.kind]
    space = template.knob_space(key.shape, isa)
    ratios: dict[tuple[tuple[str, int], ...], list[float]] = defaultdict(list)
    failed = set()
    for record in records:
        setting = tuple(sorted(record.knobs.items()))
        ratios[setting] += record.ratios
        if record.failure is not None:
            failed.add(setting)
    found = None
    for setting, values in sorted(ratios.items()):
        knobs = dict(setting)
        known = knobs.keys() == space.keys()
        if setting in failed or not known or len(values) < _LEAST_ROUNDS:
            continue
        ratio = median(values)
        better = quantiles(values, n=4)[2] < 1 and ratio < clear
        if better and (found is None or ratio < found.ratio):
            origin = "record" if records[0].key == key else "nearest"
            used = template.effective(key.shape, isa, knobs)
            found = Chosen(key, used, origin, records[0].key, ratio)
    return found
