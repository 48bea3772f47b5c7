"""From records to the knobs of a compile: the best that was measured, else the nearest's."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from slmtvm.plan.setup import DEFAULT_SETUP, Setup
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from slmtvm.tuning.records import Record, RecordLog
from slmtvm.tuning.static_record import StaticRecord
from slmtvm.tuning.tasks import Setting, TaskKey, setting_of
from slmtvm.tuning.whole import Confirmation, Provenance, SetupRecord, Turns

SIZES = ("m", "n", "k", "capacity", "ring", "table_rows")
_MOST_DISTANCE = 2.0
"""Shapes whose sizes differ by more than this, in powers of two all together, are not near."""
_CLEAR_GAIN = 0.97
"""Of the default's time: what a setting must reach for shapes near by to take it."""
_CLEAR_STATIC_GAIN = 0.8
"""Of the default's cost, what a setting must reach that was never measured."""
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Chosen:
    """How the knobs of one task were chosen: ``origin`` is "record" or "nearest", and ``of`` then
    the task that was measured, or "static"; ``ratio`` of the default's time, or cost.
    ``confirmed``: in a whole model, of which ``ratio`` then is."""

    key: TaskKey
    knobs: Knobs
    origin: str
    of: TaskKey
    ratio: float
    confirmed: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.key.label,
            "knobs": self.knobs,
            "origin": self.origin,
            "of": self.of.label,
            "ratio": round(self.ratio, 4),
            "confirmed": self.confirmed,
        }


class RecordedChoice:
    """Chooses the knobs of one target's kernels from ``records``; ``used`` says which it did.

    A setting counts as faster where three of four of its rounds are faster than the default's in
    the same round, all records of it taken together. Of a kernel that was tried in whole models
    only what these confirmed is taken, by their last word; with ``trial`` all that they have not
    refuted, by what was measured alone.
    """

    def __init__(self, records: RecordLog, target: Target, *, trial: bool = False) -> None:
        self.used: list[Chosen] = []
        self._trial = trial
        own = (r for r in records.kernels if r.target == target.name and r.isa == target.isa)
        self._measured = _by_task(own)
        self._verdicts = _verdicts(records.confirmations, target)
        self._static: dict[str, list[StaticRecord]] = defaultdict(list)
        for record in records.statics:
            if (record.target, record.isa) == (target.name, target.isa):
                self._static[record.key.text].append(record)

    def __call__(self, kind: str, shape: Any, isa: Isa) -> Knobs:
        key, default = TaskKey(kind, shape), TEMPLATES[kind].default_knobs(shape, isa)
        chosen = None if self._trial else self._confirmed(key, isa)
        if chosen is None:
            own = self._measured.get(key.text, [])
            chosen = (
                _best(own, key, isa, self._allowed)
                or self._of_a_near_shape(key, isa)
                or (None if own else self._by_its_code(key, isa))
            )
        if chosen is None:
            return default
        if all(other.key != key for other in self.used):
            self.used.append(chosen)
        return chosen.knobs

    def _allowed(self, key: TaskKey, knobs: Knobs) -> bool:
        """Whether whole models have nothing to say against a setting."""
        verdicts = self._verdicts.get(key.text, {})
        verdict = verdicts.get(setting_of(knobs))
        if verdict is None:
            return self._trial or not verdicts
        return verdict.confirmed

    def _confirmed(self, key: TaskKey, isa: Isa) -> Chosen | None:
        """The setting of this very task with which a whole model was fastest."""
        space = TEMPLATES[key.kind].knob_space(key.shape, isa)
        found = [
            (verdict.turns.ratio, setting)
            for setting, verdict in self._verdicts.get(key.text, {}).items()
            if verdict.confirmed and verdict.turns and dict(setting).keys() == space.keys()
        ]
        if not found:
            return None
        ratio, setting = min(found)
        return Chosen(key, dict(setting), "record", key, ratio, confirmed=True)

    def _by_its_code(self, key: TaskKey, isa: Isa) -> Chosen | None:
        """The setting whose code costs clearly least; nothing for a single row, which is bound by
        memory, of which code says nothing."""
        if key.shape.m == 1:
            return None
        space = TEMPLATES[key.kind].knob_space(key.shape, isa)
        found = [
            (record.ratio, setting_of(record.knobs))
            for record in self._static[key.text]
            if record.knobs.keys() == space.keys()
            and record.ratio < _CLEAR_STATIC_GAIN
            and self._allowed(key, record.knobs)
        ]
        if not found:
            return None
        ratio, setting = min(found)
        return Chosen(key, dict(setting), "static", key, ratio)

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
            found = _best(tasks[text], key, isa, self._allowed, _CLEAR_GAIN)
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


def _verdicts(
    confirmations: Iterable[Confirmation], target: Target
) -> dict[str, dict[Setting, Confirmation]]:
    """By task, the last word on each setting."""
    found: dict[str, dict[Setting, Confirmation]] = defaultdict(dict)
    for confirmation in confirmations:
        by = confirmation.provenance
        if (by.target, by.isa) == (target.name, target.isa):
            for key, knobs in confirmation.settings:
                found[key.text][setting_of(knobs)] = confirmation
    return found


def chosen_setup(records: Iterable[SetupRecord], architecture: str, target: Target) -> Setup:
    """The division with which a model of this architecture was fastest on ``target``, all records
    of it taken together; the default where none was surely faster."""
    turns: dict[Setup, dict[str, list[Turns]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        own = (record.provenance.target, record.provenance.isa) == (target.name, target.isa)
        alike = record.architecture == architecture and record.base == DEFAULT_SETUP
        if own and alike and not record.disturbed:
            for part in record.turns:
                turns[record.setup][part.phase].append(part)
    found = []
    for setup, phases in turns.items():
        joined = tuple(_joined(parts) for parts in phases.values())
        together = SetupRecord(architecture, setup, Provenance(target.name, target.isa), joined)
        if together.faster:
            found.append((together.ratio, repr(setup), setup))
    return min(found)[2] if found else DEFAULT_SETUP


def _joined(parts: list[Turns]) -> Turns:
    return Turns(
        parts[0].phase,
        tuple(s for part in parts for s in part.seconds),
        tuple(s for part in parts for s in part.default_seconds),
    )


def _best(
    records: list[Record],
    key: TaskKey,
    isa: Isa,
    allowed: Callable[[TaskKey, Knobs], bool],
    clear: float = 1.0,
) -> Chosen | None:
    """The setting of ``records`` with the least ratio that is surely faster than the default.

    Settings that fail anywhere, that kernels of ``key`` do not have, or that are not ``allowed``,
    for the shape that was measured or for that of ``key``, are left out.
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
        used = template.effective(key.shape, isa, knobs)
        if not (allowed(records[0].key, knobs) and allowed(key, used)):
            continue
        ratio = median(values)
        better = quantiles(values, n=4)[2] < 1 and ratio < clear
        if better and (found is None or ratio < found.ratio):
            origin = "record" if records[0].key == key else "nearest"
            found = Chosen(key, used, origin, records[0].key, ratio)
    return found
