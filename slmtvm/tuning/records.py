"""Records: what was measured, a JSON line each, appended and never changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from slmtvm.errors import SlmError
from slmtvm.files import read_text
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.tuning.static_record import StaticRecord
from slmtvm.tuning.tasks import TaskKey
from slmtvm.tuning.whole import FORMAT, Confirmation, SetupRecord

_MOST_BYTES = 1 << 30


class RecordError(SlmError):
    """A file of records is damaged or of another version."""


@dataclass(frozen=True)
class Record:
    """One setting of one task: seconds of a call in each round, and of the default's in the same.

    ``device`` says where: cpu, features, caches. ``failure``: why there are no seconds.
    """

    key: TaskKey
    knobs: Knobs
    target: str
    isa: str
    seconds: tuple[float, ...] = ()
    default_seconds: tuple[float, ...] = ()
    failure: str | None = None
    threads: int = 1
    working_set: int = 0
    device: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    @cached_property
    def ratios(self) -> tuple[float, ...]:
        """Of the default's time, in each round."""
        return tuple(a / b for a, b in zip(self.seconds, self.default_seconds, strict=True))

    @property
    def ratio(self) -> float:
        """The median of ``ratios``; infinite for a failure."""
        return median(self.ratios) if self.ratios else float("inf")

    def to_json(self) -> str:
        """A line, without its end."""
        return json.dumps(
            {
                "format": FORMAT,
                "task": self.key.to_json(),
                "knobs": self.knobs,
                "target": self.target,
                "isa": self.isa,
                "seconds": self.seconds,
                "default_seconds": self.default_seconds,
                "failure": self.failure,
                "threads": self.threads,
                "working_set": self.working_set,
                "device": dict(self.device),
                "versions": dict(self.versions),
                "date": self.date,
            },
            sort_keys=True,
        )

    @staticmethod
    def from_json(table: dict[str, Any]) -> Record:
        """Raises KeyError, TypeError or ValueError where ``table`` is no record."""
        seconds, default = (
            tuple(float(s) for s in table.pop(name)) for name in ("seconds", "default_seconds")
        )
        if len(seconds) != len(default) or not all(s > 0 for s in (*seconds, *default)):
            raise ValueError("seconds and default_seconds must be as many, and positive")
        if not seconds and not table["failure"]:
            raise ValueError("neither seconds nor a failure")
        knobs = {str(k): int(v) for k, v in table.pop("knobs").items()}
        key = TaskKey.from_json(table.pop("task"))
        return Record(key, knobs, seconds=seconds, default_seconds=default, **table)


Line = Record | Confirmation | SetupRecord | StaticRecord


@dataclass(frozen=True)
class RecordLog:
    """What files of records hold, each kind in order."""

    kernels: tuple[Record, ...] = ()
    confirmations: tuple[Confirmation, ...] = ()
    setups: tuple[SetupRecord, ...] = ()
    statics: tuple[StaticRecord, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.kernels or self.confirmations or self.setups or self.statics)

    @staticmethod
    def of(lines: Iterable[Line]) -> RecordLog:
        lines = list(lines)
        return RecordLog(
            tuple(r for r in lines if isinstance(r, Record)),
            tuple(r for r in lines if isinstance(r, Confirmation)),
            tuple(r for r in lines if isinstance(r, SetupRecord)),
            tuple(r for r in lines if isinstance(r, StaticRecord)),
        )


def read_log(path: str | Path) -> RecordLog:
    """The records of a file; raises as ``read_lines``."""
    return RecordLog.of(read_lines(path))


def read_records(path: str | Path) -> list[Record]:
    """The records of kernels of a file; raises as ``read_lines``."""
    return list(read_log(path).kernels)


def read_lines(path: str | Path) -> list[Line]:
    """The records of a file, in order.

    A last line without an end was being written when its writer ended: it is left out. Raises
    RecordError where any other line is none.
    """
    lines = read_text(path, _MOST_BYTES, RecordError).split("\n")
    found = []
    for number, line in enumerate(lines[:-1], 1):
        if not line.strip():
            continue
        try:
            found.append(_parse(line))
        except (AttributeError, KeyError, TypeError, ValueError, SlmError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise RecordError(f"no record: {what}", where=f"{path}:{number}") from error
    return found


def _parse(line: str) -> Line:
    table = json.loads(line)
    if table.pop("format") != FORMAT:
        raise ValueError(f"a record of another format than {FORMAT}")
    match table.pop("about", "kernel"):
        case "kernel":
            return Record.from_json(table)
        case "confirmation":
            return Confirmation.from_json(table)
        case "setup":
            return SetupRecord.from_json(table)
        case "static":
            return StaticRecord.from_json(table)
        case other:
            raise ValueError(f"about {other!r}, which this version does not know")


class RecordFile:
    """A file that records are appended to, each whole on the disk before the next."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, records: Iterable[Line]) -> None:
        """Raises RecordError where the file cannot be written."""
        text = "".join(record.to_json() + "\n" for record in records)
        try:
            with open(self.path, "ab+") as file:
                _end_last_line(file)
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RecordError(
                f"cannot be written: {error.strerror}", where=str(self.path)
            ) from error


def _end_last_line(file: Any) -> None:
    """Take off a last line that was not written to its end."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    whole = file.read().rfind(b"\n") + 1
    file.truncate(whole)


def merge_records(paths: Iterable[str | Path], output: str | Path) -> int:
    """Write every record of ``paths`` once into ``output``, replaced in one step; how many."""
    lines = {record.to_json(): None for path in paths for record in read_lines(path)}
    output = Path(output)
    made = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        made.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        made.replace(output)
    except OSError as error:
        made.unlink(missing_ok=True)
        raise RecordError(f"cannot be written: {error.strerror}", where=str(output)) from error
    return len(lines)
