"""A record of what a setting costs by its code alone: less than any measurement says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.tuning.tasks import TaskKey
from slmtvm.tuning.whole import FORMAT


@dataclass(frozen=True)
class StaticRecord:
    """``ratio`` of the default's cost, found ``by`` "llvm-mca CPU" or "instructions"."""

    key: TaskKey
    knobs: Knobs
    target: str
    isa: str
    ratio: float
    by: str
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    def to_json(self) -> str:
        """A line, without its end."""
        return json.dumps(
            {
                "format": FORMAT,
                "about": "static",
                "task": self.key.to_json(),
                "knobs": self.knobs,
                "target": self.target,
                "isa": self.isa,
                "ratio": round(self.ratio, 5),
                "by": self.by,
                "versions": dict(self.versions),
                "date": self.date,
            },
            sort_keys=True,
        )

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> StaticRecord:
        """Raises KeyError, TypeError or ValueError where ``table`` is none."""
        ratio = float(table["ratio"])
        if not ratio > 0:
            raise ValueError("ratio must be positive")
        return StaticRecord(
            TaskKey.from_json(table["task"]),
            {str(k): int(v) for k, v in table["knobs"].items()},
            str(table["target"]), str(table["isa"]), ratio, str(table["by"]),
            dict(table["versions"]), str(table["date"]),
        )  # fmt: skip
