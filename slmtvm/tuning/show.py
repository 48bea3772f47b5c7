"""Records as a table for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from slmtvm.tuning.records import Record


def table(records: Sequence[Record], *, every: bool = False) -> str:
    """The settings of each task, target and device, the fastest first; only that one by default."""
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        cpu = str(record.device.get("cpu", "unknown CPU"))
        groups[record.target, cpu, record.key.label].append(record)
    lines = [f"{'kernel':52} {'default':>10} {'speed':>6} {'trials':>6} {'failed':>6}  knobs"]
    place = ("", "")
    for (target, cpu, label), found in sorted(groups.items()):
        if (target, cpu) != place:
            place = (target, cpu)
            lines.append(f"{target}, {cpu}")
        failed = sum(r.failure is not None for r in found)
        rows = _settings(found)
        for ratio, microseconds, knobs in rows if every else rows[:1]:
            lines.append(
                f"  {label:50} {microseconds:7.1f} us {1 / ratio:6.3f} {len(found):6} {failed:6}  "
                f"{knobs}"
            )
        if every:
            lines += [f"  {label:50} {r.failure}: {_knobs(r)}" for r in found if r.failure]
    return "\n".join(lines)


def _settings(records: Sequence[Record]) -> list[tuple[float, float, str]]:
    """Ratio, microseconds of the default and knobs of each setting, the fastest first."""
    ratios: dict[str, list[float]] = defaultdict(list)
    defaults: list[float] = []
    for record in records:
        if record.ratios:
            ratios[_knobs(record)] += record.ratios
            defaults += record.default_seconds
    return sorted((median(v), 1e6 * median(defaults), k) for k, v in ratios.items())


def _knobs(record: Record) -> str:
    return " ".join(f"{name}{value}" for name, value in sorted(record.knobs.items()))
