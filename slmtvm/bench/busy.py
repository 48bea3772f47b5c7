"""How busy the machine is with other things than this process: what makes measurements too low."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_WORTH_SAYING = 0.1  # cores: what a machine that only waits uses is less


@dataclass(frozen=True)
class Busy:
    """Cores' worth of time that other processes took, and that the hypervisor gave to others."""

    others: float
    stolen: float

    def __str__(self) -> str:
        parts = [f"{self.others:.1f} cores by other processes"] if self._others_count else []
        if self.stolen > _WORTH_SAYING:
            parts.append(f"{self.stolen:.1f} by other guests of this machine")
        return " and ".join(parts) or "idle"

    @property
    def matters(self) -> bool:
        """Whether rates that were measured meanwhile are lower than the machine allows."""
        return self._others_count or self.stolen > _WORTH_SAYING

    @property
    def _others_count(self) -> bool:
        return self.others > _WORTH_SAYING


@dataclass(frozen=True)
class Stamp:
    """A moment of a machine: its clock; seconds of all its cores that were computing or stolen
    since it started; and those of the process that measures."""

    seconds: float
    computing: float
    stolen: float
    own: float


def stamp(seconds: float, stat: str, own: float, ticks: int) -> Stamp:
    """From the first line of Linux's /proc/stat, which counts in ``ticks`` a second; where it is
    none, nothing is seen."""
    try:
        fields = stat.split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, irq, softirq, stolen = (int(field) for field in fields[:8])
    except ValueError:
        return Stamp(seconds, 0.0, 0.0, 0.0)
    computing = user + nice + system + irq + softirq
    return Stamp(seconds, computing / ticks, stolen / ticks, own)


def busy_between(spans: Iterable[tuple[Stamp, Stamp]]) -> Busy:
    """How busy the machine was in these spans together."""
    seconds, others, stolen = 0.0, 0.0, 0.0
    for before, after in spans:
        seconds += after.seconds - before.seconds
        others += (after.computing - before.computing) - (after.own - before.own)
        stolen += after.stolen - before.stolen
    seconds = max(seconds, 1e-9)
    return Busy(max(others / seconds, 0.0), max(stolen / seconds, 0.0))


class Watch:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._before = _now()

    def read(self) -> Busy:
        """How busy the machine was since then."""
        return busy_between([(self._before, _now())])


def watch_for(seconds: float) -> Busy:
    """How busy the machine is while this process waits."""
    watch = Watch()
    time.sleep(seconds)
    return watch.read()


def _now() -> Stamp:
    own = os.times()
    try:
        stat = Path("/proc/stat").read_text(encoding="utf-8")
    except OSError:
        stat = ""
    used = own.user + own.system + own.children_user + own.children_system
    return stamp(time.perf_counter(), stat, used, os.sysconf("SC_CLK_TCK"))
