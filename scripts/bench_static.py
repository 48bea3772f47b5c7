"""How well a static model ranks settings: Spearman's correlation with what is measured here.

    bench_static.py [--settings 32] [--json FILE]

For each of several layers of real models, settings drawn evenly from the whole space are measured
beside the default, and ranked by their code alone; and what is left of the best setting where the
worse half by the static model is not measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import numpy as np

from slmtvm.schedules import isa as isas
from slmtvm.schedules.linear import LinearShape
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from slmtvm.tuning.measuring import Batch
from slmtvm.tuning.static import StaticModel
from slmtvm.tuning.tasks import TaskKey
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--settings", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    target = Target.load("host")
    isa, model, measurer = isas.get(target.isa), StaticModel(target), local_measurer(target)
    print(f"static: {model.by}\n{'layer':24} {'settings':>8} {'spearman':>9} {'best of half':>13}")
    found = {}
    for name, shape in LAYERS.items():
        key = TaskKey("linear", shape)
        every = TEMPLATES["linear"].settings(shape, isa)[1:]
        some = every[:: max(1, len(every) // options.settings)][: options.settings]
        times, costs = [], []
        for at in range(0, len(some), _BATCH):
            part = some[at : at + _BATCH]
            for m in measurer.measure(Batch(key, part, working_set=_WORKING_SET, rounds=5)):
                ratios = [a / b for a, b in zip(m.seconds, m.default_seconds, strict=True)]
                times.append(median(ratios) if ratios else float("inf"))
            costs += model.costs(key, part)
        rho = spearman(costs, times)
        half = np.argsort(costs)[: len(some) // 2]
        left = min(times) / min(times[i] for i in half)
        print(f"{name:24} {len(some):8} {rho:9.3f} {left:13.3f}", flush=True)
        found[name] = {"settings": len(some), "spearman": rho, "best_of_half": left}
        if options.json:
            options.json.write_text(json.dumps({"by": model.by, "layers": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
