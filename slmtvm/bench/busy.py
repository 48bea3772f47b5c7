"""How busy the machine is with other things than this process: what makes measurements too low."""

from __future__ import annotations

import os
import time
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


class Watch:
    """Counts from when it is made. Linux's /proc/stat; where it cannot be read, nothing is seen."""

    def __init__(self) -> None:
        self._started, self._before = time.perf_counter(), _times()

    def read(self) -> Busy:
        """How busy the machine was since then."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        busy, stolen, own = (
            (now - before) / seconds for now, before in zip(_times(), self._before, strict=True)
        )
        return Busy(max(busy - own, 0.0), max(stolen, 0.0))


def watch_for(seconds: float) -> Busy:
    """How busy the machine is while this process waits."""
    watch = Watch()
    time.sleep(seconds)
    return watch.read()


def _times() -> tuple[float, float, float]:
    """Seconds since the machine started, of all cores: computing, stolen, of this process."""
    own = os.times()
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, irq, softirq, stolen = (int(field) for field in fields[:8])
    except (OSError, ValueError):
        return 0.0, 0.0, 0.0
    ticks = os.sysconf("SC_CLK_TCK")
    computing = user + nice + system + irq + softirq
    return (
        computing / ticks,
        stolen / ticks,
        own.user + own.system + own.children_user + own.children_system,
    )
