#!/usr/bin/env python3
"""The tuner's search against an exhaustive sweep, on layers as real models have them.

    python scripts/bench_tuner.py sweep OUT.jsonl [--layers decode prefill int8]
    python scripts/bench_tuner.py search OUT.jsonl

`sweep` measures every setting of each layer on this machine; run again, it goes on where it was.
`search` replays searches on what was swept, for several seeds: a search sees half of the rounds of
a setting, what it found is judged by the other half. It prints how far from the best of the sweep a
search is after so many trials, and the same for a second layer after the first one's was learnt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
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
from slmtvm.tuning.measuring import Batch, Measurement
from slmtvm.tuning.program import Situation
from slmtvm.tuning.records import Record, RecordFile, read_records
from slmtvm.tuning.search import TaskSearch
from slmtvm.tuning.tasks import TaskKey, TuningTask, setting_of
from slmtvm.tuning.tune import local_measurer

# The gate of smol135 for a token and for a chunk, its other projection, and one of MiniLM.
GROUPED = {"format": "int4", "activation": "block", "group_size": 32, "scale_dtype": "float16"}
LAYERS = {
    "decode": LinearShape(1, 1536, 576, **GROUPED),
    "prefill": LinearShape(128, 1536, 576, **GROUPED),
    "prefill2": LinearShape(128, 576, 1536, **GROUPED),
    "int8": LinearShape(128, 1536, 384, "int8", "row_u8"),
}
PAIR = ("prefill", "prefill2")
WORKING_SET = 84_000_000  # bytes, smol135's
AT_ONCE, BATCH, ROUNDS = 24, 8, 8
SEEDS, WITHIN = range(10), 1.05

Table = dict[tuple[tuple[str, int], ...], tuple[float, ...]]


def sweep(path: Path, layers: Sequence[str]) -> None:
    target = Target.load("host")
    isa, measurer, file = isas.get(target.isa), local_measurer(target), RecordFile(path)
    known = read_records(path) if path.exists() else []
    for name in layers:
        key = TaskKey("linear", LAYERS[name])
        done = {setting_of(r.knobs) for r in known if r.key == key}
        settings = [
            s for s in TEMPLATES["linear"].settings(key.shape, isa) if setting_of(s) not in done
        ]
        for at in range(0, len(settings), AT_ONCE):
            batch = Batch(
                key, settings[at : at + AT_ONCE], working_set=WORKING_SET, rounds=ROUNDS,
                milliseconds=2,
            )  # fmt: skip
            file.append(
                Record(
                    key, m.knobs, target.name, target.isa, m.seconds, m.default_seconds,
                    m.failure, working_set=WORKING_SET, device=m.device,
                )
                for m in measurer.measure(batch)
            )  # fmt: skip
            print(f"{name}: {at + len(batch.settings)} of {len(settings)}", file=sys.stderr)


def search(path: Path) -> None:
    records = read_records(path)
    isa = isas.get(records[0].isa)
    tables: dict[str, Table] = {
        name: {setting_of(r.knobs): r.ratios for r in records if r.key.shape == shape}
        for name, shape in LAYERS.items()
    }
    for name, table in tables.items():
        if not table:
            continue
        most = round(0.15 * len(table))
        runs = [replay(searching(name, isa, s), table, s, most) for s in SEEDS]
        by_chance = [replay(RandomSearch(table, s), table, s, most) for s in SEEDS]
        report(f"{name}, search", table, runs)
        report(f"{name}, at random", table, by_chance)
    first, second = PAIR
    if tables[first] and tables[second]:
        most = round(0.15 * len(tables[second]))
        fresh, taught = [], []
        for seed in SEEDS:
            fresh.append(replay(searching(second, isa, seed), tables[second], seed, most))
            model = CostModel()
            before = searching(first, isa, seed, model)
            replay(before, tables[first], seed, round(0.15 * len(tables[first])))
            after = searching(second, isa, seed, model)
            taught.append(replay(after, tables[second], seed, most))
        report(f"{second} alone", tables[second], fresh)
        report(f"{second} after {first}", tables[second], taught)


def searching(name: str, isa: isas.Isa, seed: int, model: CostModel | None = None) -> TaskSearch:
    task = TuningTask(TaskKey("linear", LAYERS[name]), 1.0, KernelWork(), Situation())
    return TaskSearch(task, isa, model or CostModel(), seed)


def replay(run: TaskSearch | RandomSearch, table: Table, seed: int, most: int) -> list[float]:
    """What the best setting found so far takes, by the other half of the rounds, by trial."""
    rng = np.random.default_rng(seed)
    found: list[float] = []
    seen: dict[tuple[tuple[str, int], ...], float] = {}
    while len(found) < most and (batch := run.propose(min(BATCH, most - len(found)))):
        measured = []
        for knobs in batch:
            ratios = table.get(setting_of(knobs), ())
            half = rng.permutation(len(ratios))[: max(1, len(ratios) // 2)]
            part = tuple(ratios[i] for i in half) if ratios else ()
            rest = [r for i, r in enumerate(ratios) if i not in half] or part
            measured.append(
                Measurement(knobs, part, (1.0,) * len(part), None if part else "failed")
            )
            if part:
                seen[setting_of(knobs)] = median(part)
            best = min(seen, key=lambda s: seen[s], default=None)
            if best == setting_of(knobs):
                judged = median(rest)
            found.append(min(1.0, judged) if seen else 1.0)
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


def report(title: str, table: Table, runs: Sequence[Sequence[float]]) -> None:
    best = min(1.0, *(median(r) for r in table.values() if r))
    needed = [next((n + 1 for n, v in enumerate(run) if v <= WITHIN * best), None) for run in runs]
    reached = [n for n in needed if n is not None]
    middle = median(reached) if reached else float("nan")
    ends = median(run[-1] for run in runs) / best
    print(
        f"{title:28} {len(table):4} settings, best {1 / best:.3f} of the default's speed; "
        f"{len(runs[0]):3} trials end at {ends:.3f} of the best time; within 5%: "
        f"{len(reached)} of {len(runs)} runs, after {middle} trials (median)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    sweeping = actions.add_parser("sweep")
    sweeping.add_argument("records", type=Path)
    sweeping.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    actions.add_parser("search").add_argument("records", type=Path)
    options = parser.parse_args()
    if options.action == "sweep":
        sweep(options.records, options.layers)
    else:
        search(options.records)


if __name__ == "__main__":
    main()
