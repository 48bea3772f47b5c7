"""Tasks and records that tests share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from slmtvm.schedules.linear import LinearShape
from slmtvm.target import Target
from slmtvm.tuning.records import Record
from slmtvm.tuning.tasks import TaskKey

SHAPE = LinearShape(1, 96, 64, "int4", "block", 32, scale_dtype="float16")
ROWS = replace(SHAPE, m=6, has_bias=True, has_residual=True)
KEY = TaskKey("linear", SHAPE)
HOST = Target.load("host")


def key(**changes: Any) -> TaskKey:
    return TaskKey("linear", replace(ROWS, **changes))


def record(
    of: TaskKey = KEY, ratio: float = 0.5, spread: float = 0.02, **fields: Any
) -> Record:  # fmt: skip
    """A record of five rounds around ``ratio`` of the default's time."""
    rounds = [ratio * (1 + spread * i) for i in (-2, -1, 0, 1, 2)]
    values: dict[str, Any] = {
        "knobs": {"mr": 1, "nv": 2, "pf": 0, "ku": 16, "gu": 2, "ps": 0},
        "target": HOST.name,
        "isa": HOST.isa,
        "seconds": tuple(rounds),
        "default_seconds": (1.0,) * len(rounds),
        **fields,
    }
    return Record(of, **values)
