"""How well a static model ranks settings: Spearman's correlation with what is measured here.

    bench_static.py [--settings 32] [--json FILE]
    bench_static.py --records FILE [--settings 64] [--rows 16] [--json FILE]

For each of several layers of real models, settings drawn evenly from the whole space are measured
beside the default, and ranked by their code alone; and what is left of the best setting where the
worse half by the static model is not measured. With --records nothing is measured: the kernels and
settings are those that `slmtvm tune` measured on this machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from slmtvm.schedules import isa as isas
from slmtvm.schedules.linear import LinearShape
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from slmtvm.tuning.measuring import Batch, Measurer
from slmtvm.tuning.records import read_records
from slmtvm.tuning.static import StaticModel
from slmtvm.tuning.tasks import Setting, TaskKey, setting_of
from slmtvm.tuning.tune import local_measurer

_BATCH = 8
_WORKING_SET = 4 << 20
LAYERS = {
    "demo int4, 1 row": LinearShape(1, 1536, 256, "int4", "block", 32, scale_dtype="float16"),
    "demo int4, 16 rows": LinearShape(16, 1536, 256, "int4", "block", 32, scale_dtype="float16"),
    "demo int4, 128 rows": LinearShape(128, 256, 768, "int4", "block", 32, scale_dtype="float16"),
    "SmolLM int4, 16 rows": LinearShape(16, 576, 1536, "int4", "block", 32, scale_dtype="float16"),
    "MiniLM int8, 128 rows": LinearShape(128, 1536, 384, "int8", "row_u8"),
}


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of ranks; equal values have their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: list[float]) -> np.ndarray:
    array = np.asarray(values)
    return np.array([(array < v).sum() + ((array == v).sum() - 1) / 2 for v in array])


def measured(key: TaskKey, settings: Sequence[Knobs], measurer: Measurer) -> list[float]:
    """The settings' times, of the default's."""
    times: list[float] = []
    for at in range(0, len(settings), _BATCH):
        part = settings[at : at + _BATCH]
        for m in measurer.measure(Batch(key, part, working_set=_WORKING_SET, rounds=5)):
            ratios = [a / b for a, b in zip(m.seconds, m.default_seconds, strict=True)]
            times.append(median(ratios) if ratios else float("inf"))
    return times


def from_records(path: Path, most: int, rows: int | None) -> dict[TaskKey, dict[Setting, float]]:
    """Of linear layers, of so many rows: settings and their times, of the default's."""
    found: dict[TaskKey, dict[Setting, list[float]]] = {}
    for r in read_records(path):
        if r.key.kind == "linear" and r.ratios and rows in (None, r.key.shape.m):
            found.setdefault(r.key, {}).setdefault(setting_of(r.knobs), []).extend(r.ratios)
    return {
        key: {setting: median(ratios) for setting, ratios in list(times.items())[:most]}
        for key, times in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--settings", type=int, default=32)
    parser.add_argument("--records", type=Path)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    target = Target.load("host")
    isa, model = isas.get(target.isa), StaticModel(target)
    tasks: dict[str, tuple[TaskKey, list[Knobs], list[float] | None]] = {}
    if options.records:
        known = from_records(options.records, options.settings, options.rows)
        for key, times in known.items():
            tasks[key.label] = key, [dict(s) for s in times], list(times.values())
    else:
        for name, shape in LAYERS.items():
            every = TEMPLATES["linear"].settings(shape, isa)[1:]
            some = every[:: max(1, len(every) // options.settings)][: options.settings]
            tasks[name] = TaskKey("linear", shape), some, None
    print(f"static: {model.by}\n{'layer':40} {'settings':>8} {'spearman':>9} {'best of half':>13}")
    found = {}
    for name, (key, some, given) in tasks.items():
        times = measured(key, some, local_measurer(target)) if given is None else given
        costs: list[float] = []
        for at in range(0, len(some), _BATCH):
            costs += model.costs(key, some[at : at + _BATCH])
        rho = spearman(costs, times)
        half = np.argsort(costs)[: len(some) // 2]
        left = min(times) / min(times[i] for i in half)
        print(f"{name:40} {len(some):8} {rho:9.3f} {left:13.3f}", flush=True)
        found[name] = {"settings": len(some), "spearman": rho, "best_of_half": left}
        if options.json:
            options.json.write_text(json.dumps({"by": model.by, "layers": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
