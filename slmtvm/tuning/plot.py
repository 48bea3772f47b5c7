"""Records as plots: the best over trials, and each knob against time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from slmtvm.errors import SlmError
from slmtvm.tuning.records import Record

_MOST_TASKS = 12  # those with the most records
_INCHES = 2.2  # of a plot's side
_POINT, _BEST = "#4c72b0", "#c44e52"


def plot(records: Sequence[Record], path: Path) -> int:
    """Write a row of plots for each task, at most 12, in the format that the name of ``path`` ends
    in (png, svg, pdf); how many tasks were left out.

    The first plot of a row has the ratio to the default of each setting in the order in which they
    were measured, and the best so far; the others have the ratio by the value of a knob. Raises
    SlmError where matplotlib is missing, nothing was measured or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SlmError(
            "plots need matplotlib, which is not installed: pip install 'slmtvm[plot]'"
        ) from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = _tasks(records)
    if not tasks:
        raise SlmError("no setting was measured, so there is nothing to plot", where=f"{path}")
    shown = tasks[:_MOST_TASKS]
    columns = 1 + max(len(_knobs(found)) for _, found in shown)
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 7}):
        size = (_INCHES * columns, _INCHES * len(shown))
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(shown), columns, squeeze=False, sharey="row")
        for row, (title, found) in zip(axes, shown, strict=True):
            _fill(row, title, found)
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as error:
            raise SlmError(f"cannot be written: {error}", where=f"{path}") from error
    return len(tasks) - len(shown)


def _tasks(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """What was measured of each task on each target, that with the most records first."""
    found: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if record.ratios:
            found[record.key.label, record.target].append(record)
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return [(f"{label}\n{target}", group) for (label, target), group in ordered]


def _knobs(records: Sequence[Record]) -> list[str]:
    """Those that differ between records."""
    names = sorted({name for record in records for name in record.knobs})
    return [n for n in names if len({record.knobs.get(n) for record in records}) > 1]


def _fill(row: Sequence[Any], title: str, records: Sequence[Record]) -> None:
    first, *others = row
    ratios = [record.ratio for record in records]
    trials = range(1, len(records) + 1)
    first.scatter(trials, ratios, s=6, color=_POINT)
    first.step(trials, list(accumulate(ratios, min)), where="post", color=_BEST)
    first.set_title(title, fontsize=6)
    first.set_xlabel("trial")
    first.set_ylabel("time, of the default's")
    knobs = _knobs(records)
    for axis, name in zip(others, knobs, strict=False):
        values = sorted({record.knobs.get(name, 0) for record in records})
        places = [values.index(record.knobs.get(name, 0)) for record in records]
        axis.scatter(places, ratios, s=6, color=_POINT)
        axis.set_xticks(range(len(values)), [str(value) for value in values])
        axis.set_xlabel(name)
    for axis in (first, *others[: len(knobs)]):
        axis.axhline(1.0, color="gray", linewidth=0.5)
    for axis in others[len(knobs) :]:
        axis.set_axis_off()
