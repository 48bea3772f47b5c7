"""Records of whole models: which settings were faster there, and how one is best divided.

A kernel is measured alone, with the cache and the clock to itself. What is faster so may be slower
among others: a whole model has the last word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median, quantiles
from typing import Any

from slmtvm.plan.setup import DEFAULT_SETUP, Setup
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.tuning.tasks import TaskKey

FORMAT = 1
_LEAST_TURNS = 3
_MOST_BUSY = 0.25  # cores: what a machine that is left alone does at times is less


@dataclass(frozen=True)
class Turns:
    """Seconds of one phase ("decode", "prefill", "encode 64") in each turn, and of the default's in
    the same."""

    phase: str
    seconds: tuple[float, ...]
    default_seconds: tuple[float, ...]

    @cached_property
    def ratios(self) -> tuple[float, ...]:
        """Of the default's time, in each turn."""
        return tuple(a / b for a, b in zip(self.seconds, self.default_seconds, strict=True))

    @property
    def ratio(self) -> float:
        """The median of ``ratios``."""
        return median(self.ratios)

    @property
    def faster(self) -> bool:
        """Whether three of four turns were faster than the default's."""
        return len(self.ratios) >= _LEAST_TURNS and quantiles(self.ratios, n=4)[2] < 1

    @property
    def slower(self) -> bool:
        """Whether three of four turns were slower."""
        return len(self.ratios) >= _LEAST_TURNS and quantiles(self.ratios, n=4)[0] > 1

    def __str__(self) -> str:
        low, _, high = quantiles([1 / r for r in self.ratios], n=4)
        return f"{self.phase} {1 / self.ratio:.3f} times as fast [{low:.3f} to {high:.3f}]"

    def to_json(self) -> dict[str, Any]:
        return {
            "phase": self.phase, "seconds": self.seconds, "default_seconds": self.default_seconds
        }  # fmt: skip

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> Turns:
        """Raises KeyError, TypeError or ValueError where ``table`` is none."""
        seconds, default = (
            tuple(float(s) for s in table[name]) for name in ("seconds", "default_seconds")
        )
        if len(seconds) != len(default) or not all(s > 0 for s in (*seconds, *default)):
            raise ValueError("seconds and default_seconds must be as many, and positive")
        if len(seconds) < 2:
            raise ValueError("one turn says nothing")
        return Turns(str(table["phase"]), seconds, default)


@dataclass(frozen=True)
class Provenance:
    """Where something was measured, and by what."""

    target: str
    isa: str
    threads: int = 1
    device: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target, "isa": self.isa, "threads": self.threads,
            "device": dict(self.device), "versions": dict(self.versions), "date": self.date,
        }  # fmt: skip

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> Provenance:
        """Raises KeyError, TypeError or ValueError where ``table`` has none."""
        return Provenance(
            str(table["target"]), str(table["isa"]), int(table["threads"]),
            dict(table["device"]), dict(table["versions"]), str(table["date"]),
        )  # fmt: skip


@dataclass(frozen=True)
class Confirmation:
    """Settings that were compared with the defaults in a whole model: ``family`` says which kernels
    in words, ``model`` is the name of its file; ``failure`` why there are no turns."""

    settings: tuple[tuple[TaskKey, Knobs], ...]
    provenance: Provenance
    family: str
    model: str = ""
    turns: Turns | None = None
    failure: str | None = None

    @property
    def confirmed(self) -> bool:
        """Whether the model was surely faster with them; they are refuted where it was not."""
        return self.failure is None and self.turns is not None and self.turns.faster

    def __str__(self) -> str:
        what = "confirmed" if self.confirmed else "refuted"
        return f"{self.family}: {what}, {self.failure or self.turns}"

    def to_json(self) -> str:
        """A line, without its end."""
        return json.dumps(
            {
                "format": FORMAT,
                "about": "confirmation",
                "verdict": "confirmed" if self.confirmed else "refuted",
                "family": self.family,
                "model": self.model,
                "settings": [{"task": k.to_json(), "knobs": v} for k, v in self.settings],
                "turns": self.turns and self.turns.to_json(),
                "failure": self.failure,
                **self.provenance.to_json(),
            },
            sort_keys=True,
        )

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> Confirmation:
        """Raises KeyError, TypeError or ValueError where ``table`` is none."""
        settings = tuple(
            (TaskKey.from_json(s["task"]), {str(k): int(v) for k, v in s["knobs"].items()})
            for s in table["settings"]
        )
        turns = None if table["turns"] is None else Turns.from_json(table["turns"])
        if turns is None and not table["failure"]:
            raise ValueError("neither turns nor a failure")
        return Confirmation(
            settings, Provenance.from_json(table), str(table["family"]), str(table["model"]), turns,
            table["failure"],
        )  # fmt: skip


@dataclass(frozen=True)
class SetupRecord:
    """How a model was divided, compared with the division ``base``; ``architecture`` as a
    ``Planner`` has it. ``turns`` are those of each phase; ``busy``: cores' worth of other things
    that the machine did meanwhile."""

    architecture: str
    setup: Setup
    provenance: Provenance
    turns: tuple[Turns, ...]
    base: Setup = DEFAULT_SETUP
    model: str = ""
    busy: float = 0.0

    @property
    def disturbed(self) -> bool:
        """Whether it compares threads, some of which had no core to themselves."""
        alike = replace(self.setup, chunks=self.base.chunks) == self.base
        return not alike and self.busy > _MOST_BUSY

    @property
    def faster(self) -> bool:
        """Whether a phase was surely faster and none surely slower."""
        if self.disturbed:
            return False
        return any(t.faster for t in self.turns) and not any(t.slower for t in self.turns)

    @property
    def ratio(self) -> float:
        """Of the base's time, of all phases together."""
        return total([t.seconds for t in self.turns]) / total(
            [t.default_seconds for t in self.turns]
        )

    def __str__(self) -> str:
        phases = "; ".join(map(str, self.turns))
        why = f", with {self.busy:.1f} cores busy with other things" if self.disturbed else ""
        return f"{self.setup}: {phases}{'' if self.faster else ', not taken'}{why}"

    def to_json(self) -> str:
        """A line, without its end."""
        return json.dumps(
            {
                "format": FORMAT,
                "about": "setup",
                "architecture": self.architecture,
                "model": self.model,
                "setup": self.setup.to_json(),
                "base": self.base.to_json(),
                "busy": round(self.busy, 3),
                "turns": [t.to_json() for t in self.turns],
                **self.provenance.to_json(),
            },
            sort_keys=True,
        )

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> SetupRecord:
        """Raises KeyError, TypeError or ValueError where ``table`` is none."""
        turns = tuple(Turns.from_json(t) for t in table["turns"])
        if not turns:
            raise ValueError("no turns")
        return SetupRecord(
            str(table["architecture"]), Setup.from_json(table["setup"]),
            Provenance.from_json(table), turns, Setup.from_json(table["base"]),
            str(table["model"]), float(table["busy"]),
        )  # fmt: skip


def total(phases: Sequence[Sequence[float]]) -> float:
    """The median of all phases' seconds together."""
    return median(map(sum, zip(*phases, strict=False)))
