#!/usr/bin/env python3
"""The tuner's search against an exhaustive sweep, on layers as real models have them.

    python scripts/bench_tuner.py build FOLDER [--layers decode prefill int8] [--minutes M]
    python scripts/bench_tuner.py sweep FOLDER OUT.jsonl [--minutes M]
    python scripts/bench_tuner.py search OUT.jsonl [--plot FILE.svg]

`build` compiles every setting of each layer for this machine, which takes long but no quiet
machine; `sweep` measures what was built. Both go on where they were when run again.
`search` replays searches on what was swept, for several seeds, without measuring anything again.
It prints how far from the best of the sweep a search is after so many trials, and the same for a
second layer after the first one's was learnt.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from slmtvm.plan.model import KernelWork
from slmtvm.schedules import isa as isas
from slmtvm.schedules.linear import LinearShape
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from slmtvm.tuning.cost_model import CostModel
from slmtvm.tuning.local import LocalRunner
from slmtvm.tuning.measuring import Batch, BatchProgram, Measurement
from slmtvm.tuning.program import Situation
from slmtvm.tuning.records import Record, RecordFile, read_records
from slmtvm.tuning.search import TaskSearch
from slmtvm.tuning.tasks import TaskKey, TuningTask, setting_of
from slmtvm.tuning.tune import this_machine

# The gate of smol135 for a token and for a chunk, its other projection, and those of MiniLM.
GROUPED = {"format": "int4", "activation": "block", "group_size": 32, "scale_dtype": "float16"}
LAYERS = {
    "decode": LinearShape(1, 1536, 576, **GROUPED),
    "decode2": LinearShape(1, 576, 1536, **GROUPED),
    "int8": LinearShape(128, 1536, 384, "int8", "row_u8"),
    "int8_2": LinearShape(128, 384, 1536, "int8", "row_u8"),
    "prefill": LinearShape(128, 1536, 576, **GROUPED),
}
PAIRS = (("decode", "decode2"), ("int8", "int8_2"))
WORKING_SET = 84_000_000  # bytes, smol135's
AT_ONCE, BATCH, ROUNDS = 24, 8, 40
SEEN, CONFIRMED = 7, 3  # as the tuner has them
SEEDS, WITHIN, PART = range(20), 1.05, 0.15

Table = dict[tuple[tuple[str, int], ...], tuple[float, ...]]


def build(folder: Path, layers: Sequence[str], minutes: float) -> None:
    target = Target.load("host")
    isa, end = isas.get(target.isa), time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    for name in layers:
        key = TaskKey("linear", LAYERS[name])
        settings = TEMPLATES["linear"].settings(key.shape, isa)
        for at in range(0, len(settings), AT_ONCE):
            path = folder / f"{name}-{at:04}.pickle"
            if path.exists():
                continue
            if time.monotonic() > end:
                return
            batch = Batch(
                key, settings[at : at + AT_ONCE], working_set=WORKING_SET, rounds=ROUNDS,
                milliseconds=2,
            )  # fmt: skip
            made = path.with_suffix(".new")
            made.write_bytes(pickle.dumps((batch, BatchProgram(batch, target))))
            made.replace(path)
            print(f"{name}: {at + len(batch.settings)} of {len(settings)}", file=sys.stderr)


def sweep(folder: Path, path: Path, minutes: float) -> None:
    target, run, device = Target.load("host"), LocalRunner(), this_machine()
    file, end = RecordFile(path), time.monotonic() + 60 * minutes
    known = read_records(path) if path.exists() else []
    done = {(r.key.text, setting_of(r.knobs)) for r in known}
    for each in sorted(folder.glob("*.pickle")):
        if time.monotonic() > end:
            return
        batch, program = pickle.loads(each.read_bytes())
        if all((batch.key.text, setting_of(s)) in done for s in batch.settings):
            continue
        file.append(
            Record(
                batch.key, m.knobs, target.name, target.isa, m.seconds, m.default_seconds,
                m.failure, working_set=WORKING_SET, device=m.device,
            )
            for m in program.run(run, device)
        )  # fmt: skip
        print(each.stem, file=sys.stderr)


def search(path: Path) -> list[Curve]:
    """What searches reach on what was swept; printed, and as curves."""
    records = read_records(path)
    isa = isas.get(records[0].isa)
    tables: dict[str, Table] = {
        name: {setting_of(r.knobs): r.ratios for r in records if r.key.shape == shape}
        for name, shape in LAYERS.items()
    }
    curves = []
    for name, table in tables.items():
        if not table:
            continue
        most = round(PART * len(table))
        runs = [replay(searching(name, isa, s), table, s, most) for s in SEEDS]
        by_chance = [replay(RandomSearch(table, s), table, s, most) for s in SEEDS]
        curves.append(Curve(name, "search", table, runs))
        curves.append(Curve(name, "at random", table, by_chance))
    for first, second in PAIRS:
        if not (tables[first] and tables[second]):
            continue
        most = round(PART * len(tables[second]))
        taught = []
        for seed in SEEDS:
            model = CostModel()
            before = searching(first, isa, seed, model)
            replay(before, tables[first], seed, round(PART * len(tables[first])))
            after = searching(second, isa, seed, model)
            taught.append(replay(after, tables[second], seed, most))
        curves.append(Curve(second, f"after {first}", tables[second], taught))
    for curve in curves:
        print(curve)
    return curves


def searching(name: str, isa: isas.Isa, seed: int, model: CostModel | None = None) -> TaskSearch:
    task = TuningTask(TaskKey("linear", LAYERS[name]), 1.0, KernelWork(), Situation())
    return TaskSearch(task, isa, model or CostModel(), seed)


def replay(run: TaskSearch | RandomSearch, table: Table, seed: int, most: int) -> list[float]:
    """What the best setting found so far takes, by trial.

    As the tuner does, a search sees SEEN rounds of a setting; the CONFIRMED best of them are then
    compared by all rounds, which is counted as so many trials.
    """
    rng = np.random.default_rng(seed)
    found = [1.0] * CONFIRMED
    seen: dict[tuple[tuple[str, int], ...], float] = {}
    while len(found) < most and (batch := run.propose(min(BATCH, most - len(found)))):
        measured = []
        for knobs in batch:
            setting = setting_of(knobs)
            ratios = table.get(setting, ())
            part = tuple(rng.choice(ratios, SEEN, replace=False)) if ratios else ()
            measured.append(
                Measurement(knobs, part, (1.0,) * len(part), None if part else "failed")
            )
            if part:
                seen[setting] = median(part)
            best = sorted(seen, key=lambda s: seen[s])[:CONFIRMED]
            found.append(min([1.0, *(median(table[s]) for s in best)]))
        run.update(measured)
    return found


class RandomSearch:
    """Proposes settings in no order: what the search has to be better than."""

    def __init__(self, table: Table, seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(table))
        self._left = [dict(list(table)[i]) for i in order]

    def propose(self, count: int) -> list[dict[str, int]]:
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def update(self, measured: Sequence[Measurement]) -> None:
        pass


@dataclass(frozen=True)
class Curve:
    """Runs of one way to search a layer."""

    layer: str
    how: str
    table: Table
    runs: Sequence[Sequence[float]]

    @property
    def best(self) -> float:
        """Of the sweep."""
        return min(1.0, *(median(r) for r in self.table.values() if r))

    @property
    def needed(self) -> list[int]:
        """Trials until a run is within the bar; one more than there were where it never is."""
        bar = WITHIN * self.best
        return [next((n for n, v in enumerate(r, 1) if v <= bar), len(r) + 1) for r in self.runs]

    def __str__(self) -> str:
        reached = sum(n <= len(self.runs[0]) for n in self.needed)
        ends = median(run[-1] for run in self.runs) / self.best
        return (
            f"{self.layer + ', ' + self.how:24} {len(self.table):4} settings, best "
            f"{1 / self.best:.3f} of the default's speed; {len(self.runs[0]):3} trials end at "
            f"{ends:.3f} of the best time; within 5%: {reached} of {len(self.runs)} runs, after "
            f"{median(self.needed)} trials (median), {max(self.needed)} (most)"
        )


def plot(curves: Sequence[Curve], path: Path) -> None:
    """The best time found so far, of the sweep's best, over trials: median and all runs."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "slmtvm"
    layers = list(dict.fromkeys(c.layer for c in curves))
    figure, axes = pyplot.subplots(
        1, len(layers), figsize=(3 * len(layers), 3), sharey=True, layout="constrained"
    )
    for ax, layer in zip(np.atleast_1d(axes), layers, strict=True):
        for colour, curve in enumerate(c for c in curves if c.layer == layer):
            runs = np.array(curve.runs) / curve.best
            trials = np.arange(1, runs.shape[1] + 1)
            ax.fill_between(trials, *np.quantile(runs, [0.1, 0.9], axis=0), color=f"C{colour}",
                            alpha=0.15, linewidth=0)  # fmt: skip
            ax.plot(trials, np.median(runs, axis=0), color=f"C{colour}", label=curve.how)
        ax.axhline(WITHIN, color="grey", linestyle=":", linewidth=1)
        ax.set_title(f"{layer}, {len(curve.table)} settings", fontsize=9)
        ax.set_xlabel("trials")
        ax.legend(fontsize=7)
    np.atleast_1d(axes)[0].set_ylabel("time of the best found / of the sweep's best")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    building = actions.add_parser("build")
    building.add_argument("folder", type=Path)
    building.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    sweeping = actions.add_parser("sweep")
    sweeping.add_argument("folder", type=Path)
    sweeping.add_argument("records", type=Path)
    for action in (building, sweeping):
        action.add_argument("--minutes", type=float, default=1e9)
    searching = actions.add_parser("search")
    searching.add_argument("records", type=Path)
    searching.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.action == "build":
        build(options.folder, options.layers, options.minutes)
    elif options.action == "sweep":
        sweep(options.folder, options.records, options.minutes)
    else:
        curves = search(options.records)
        if options.plot:
            plot(curves, options.plot)


if __name__ == "__main__":
    main()
