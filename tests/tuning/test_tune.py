"""A model is tuned on this machine, and compiled with what was found."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import slmtvm
from slmtvm.bench.limits import Limits
from slmtvm.bundle.write import write_bundle
from slmtvm.compiler import compile_model, plan_model
from slmtvm.errors import TargetError
from slmtvm.host import cpu_name
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.plan.model import Plan
from slmtvm.runtime import load
from slmtvm.schedules import isa as isas
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.tuning.choice import RecordedChoice
from slmtvm.tuning.measuring import Batch, Measurement
from slmtvm.tuning.records import Record, RecordFile, RecordLog, read_records
from slmtvm.tuning.tasks import TaskKey, Workload, tuning_tasks
from slmtvm.tuning.tune import local_measurer
from slmtvm.tuning.tuner import Budget, Progress, tune_plan
from tests.models import TOKENIZER, model_path, prompt_ids
from tests.passes import toy, toy_experts
from tests.tuning.tasks import HOST, record

MODELS = {"int4": lambda: toy.decoder("int4"), "experts": toy_experts.decoder}


@pytest.fixture(scope="module", params=["int4", pytest.param("experts", marks=pytest.mark.slow)])
def fused(request: pytest.FixtureRequest) -> CanonicalModel:
    return fuse(MODELS[request.param]())


@pytest.fixture(scope="module")
def plan() -> Plan:
    return build_plan(lower(fuse(toy.decoder("int4")), HOST), {})


def any_records(plan: Plan, seed: int = 0) -> list[Record]:
    """For each task of a plan, a record of some setting that is not the default."""
    isa, choose = isas.get(HOST.isa), random.Random(seed)
    tasks = tuning_tasks(plan, Workload())
    settings = [TEMPLATES[t.key.kind].settings(t.key.shape, isa)[1:] for t in tasks]
    return [record(t.key, knobs=choose.choice(s)) for t, s in zip(tasks, settings, strict=True)]


def _ratio(knobs: Knobs) -> float:
    return 0.5 + zlib.crc32(repr(sorted(knobs.items())).encode()) % 100 / 250


class Fake:
    """A measurer without a device: the seconds are a function of the knobs."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.batches: list[Batch] = []
        self._left = interrupt_after

    def measure(self, batch: Batch) -> list[Measurement]:
        if self._left is not None and len(self.batches) >= self._left:
            raise KeyboardInterrupt
        self.batches.append(batch)
        return [
            Measurement(k, (_ratio(k),) * batch.rounds, (1.0,) * batch.rounds)
            for k in batch.settings
        ]

    @property
    def settings(self) -> list[tuple[object, ...]]:
        searched = [b for b in self.batches if b.rounds < 10]
        return [(b.key.text, *sorted(k.items())) for b in searched for k in b.settings]


@pytest.mark.slow
def test_measurements_of_this_machine_become_records(plan: Plan, tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "r.jsonl")
    heard: list[Progress] = []
    report = tune_plan(
        plan, HOST, local_measurer(HOST), file,
        budget=Budget(trials=12), progress=heard.append,
    )  # fmt: skip
    records = read_records(file.path)
    assert report.trials == 12 and not report.interrupted
    assert len(records) >= 12 and not report.failures
    assert all(r.failure is None and r.device["cpu"] == cpu_name() for r in records)
    assert sum(t.share for t in report.tasks) == pytest.approx(1)
    assert sorted({p.trials for p in heard}) == [p.trials for p in heard[:2]]
    assert heard[1].trials == 12
    assert all(r.working_set and len(r.seconds) == len(r.default_seconds) for r in records)


@pytest.mark.slow
def test_a_resumed_search_measures_only_what_is_new(plan: Plan, tmp_path: Path) -> None:
    file, first, second = RecordFile(tmp_path / "r.jsonl"), Fake(), Fake()
    tune_plan(plan, HOST, first, file, budget=Budget(trials=40))
    known = read_records(file.path)
    tune_plan(plan, HOST, second, file, known=known, budget=Budget(trials=40))
    assert second.settings and not set(first.settings) & set(second.settings)


def test_an_interrupted_search_keeps_what_it_has(plan: Plan, tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "r.jsonl")
    report = tune_plan(plan, HOST, Fake(interrupt_after=3), file)
    assert report.interrupted and report.trials > 16
    assert len(read_records(file.path)) == report.trials
    assert report.gain > 1


def test_time_goes_first_where_most_of_it_is_spent(plan: Plan, tmp_path: Path) -> None:
    fake = Fake()
    tune_plan(
        plan, HOST, fake, RecordFile(tmp_path / "r"), budget=Budget(trials=8),
        workload=Workload(prompt=16 * 1000, generate=0),
    )  # fmt: skip
    assert fake.batches[0].key.shape.m == 16
    fake = Fake()
    tune_plan(
        plan, HOST, fake, RecordFile(tmp_path / "r"), budget=Budget(trials=8),
        workload=Workload(prompt=0, generate=1000),
    )  # fmt: skip
    assert fake.batches[0].key.shape.m == 1


def test_the_best_setting_is_compared_with_the_limits_of_the_device(
    plan: Plan, tmp_path: Path
) -> None:
    heard: list[Progress] = []
    limits = Limits(1, 0, read_bytes_per_second=1e6, multiply_adds_per_second=1e12)
    report = tune_plan(
        plan, HOST, Fake(), RecordFile(tmp_path / "r"), budget=Budget(trials=24), limits=limits,
        progress=heard.append,
    )  # fmt: skip
    measured = [t for t in report.tasks if t.trials and t.key.kind == "linear"]
    assert measured and heard[-1].of_limit
    for task in measured:  # a call takes one second with default knobs
        assert task.of_limit == pytest.approx(task.weight_bytes / 1e6 / task.ratio)


def test_a_static_model_keeps_the_worse_half_from_being_measured(
    plan: Plan, tmp_path: Path
) -> None:
    class Judge:
        def costs(self, key: TaskKey, settings: Sequence[Knobs]) -> list[float]:
            return [float(knobs["nv"]) for knobs in settings]

    fake, heavy = Fake(), Workload(prompt=16 * 1000, generate=0)
    tune_plan(
        plan, HOST, fake, RecordFile(tmp_path / "r"), budget=Budget(trials=8), workload=heavy,
        judge=Judge(),  # type: ignore[arg-type]
    )  # fmt: skip
    (batch,) = [b for b in fake.batches if b.rounds < 10]
    unfiltered = Fake()
    tune_plan(
        plan, HOST, unfiltered, RecordFile(tmp_path / "s"), budget=Budget(trials=16), workload=heavy
    )
    widths = sorted(k["nv"] for b in unfiltered.batches if b.rounds < 10 for k in b.settings)
    assert len(batch.settings) == 8 and batch.key.shape.m == 16
    assert sum(k["nv"] for k in batch.settings) < sum(widths) / 2


def test_records_of_a_relative_teach_the_model_but_are_not_taken(
    plan: Plan, tmp_path: Path
) -> None:
    file = RecordFile(tmp_path / "r.jsonl")
    relatives = [
        record(r.key, knobs=r.knobs, target="another-avx-board", ratio=0.1)
        for r in any_records(plan)
    ]
    fake = Fake()
    report = tune_plan(plan, HOST, fake, file, known=relatives, budget=Budget(trials=8))
    assert report.trials == 8
    assert all(task.ratio >= 0.5 for task in report.tasks)


def _logits(path: Path, chunks: Sequence[int]) -> list[np.ndarray]:
    with load(path, threads=1) as session:
        ids = np.arange(sum(chunks), dtype=np.int32) % toy.VOCAB
        found, at = [], 0
        for count in chunks:
            found.append(session.eval(ids[at : at + count]).copy())
            at += count
        return found


@pytest.mark.slow
def test_knobs_change_no_bit_of_a_model(fused: CanonicalModel, tmp_path: Path) -> None:
    plain = build_plan(lower(fused, HOST), {})
    choice = RecordedChoice(RecordLog.of(any_records(plain)), HOST)
    tuned = build_plan(lower(fused, HOST, choose=choice), {})
    # What is tuned has a record of its own; kernels of batches take the nearest shape's.
    tasks = {task.key for task in tuning_tasks(plain, Workload())}
    assert {chosen.key for chosen in choice.used} >= tasks
    assert plain.kernels.keys() != tuned.kernels.keys()
    for name, made in (("plain", plain), ("tuned", tuned)):
        write_bundle(tmp_path / name, [(HOST, made)])
    results = [_logits(tmp_path / name, (16, 1, 1, 20)) for name in ("plain", "tuned")]
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def test_a_target_that_this_machine_cannot_run_is_refused(tmp_path: Path) -> None:
    foreign = "cortex-a78" if HOST.arch != "aarch64" else "riscv64-rvv"
    with pytest.raises(TargetError, match=f"{foreign}: this machine's CPU cannot run it"):
        slmtvm.tune("no.onnx", foreign, records=tmp_path / "none")


@pytest.mark.slow
def test_the_demo_model_is_tuned_and_compiled_to_the_same_bits(tmp_path: Path) -> None:
    records, model = tmp_path / "r.jsonl", model_path("demo")
    report = slmtvm.tune(model, records=records, trials=24, context=320, confirm=False)
    assert report.trials == 24
    assert len(read_records(records)) >= 24
    given, others = tmp_path / "any.jsonl", any_records(plan_model(model, HOST, context=320))
    RecordFile(given).append(others)
    bundles = {}
    for name in ("plain", "tuned"):
        bundles[name] = compile_model(
            model, output=tmp_path / f"{name}.slm", context=320, tokenizer=TOKENIZER,
            records=given if name == "tuned" else None, check=name == "tuned",
        )  # fmt: skip
    tuning = bundles["tuned"].manifest.extra["tuning"][HOST.name]
    assert [entry["origin"] for entry in tuning].count("record") == len(others)
    assert "tuning" not in bundles["plain"].manifest.extra
    ids = np.array(prompt_ids()[0], np.int32)
    results = []
    for bundle in bundles.values():
        with load(bundle.path, threads=1) as session:
            results.append(session.eval(ids).copy().view(np.uint32))
    np.testing.assert_array_equal(results[0], results[1])
    assert json.loads((bundles["tuned"].path / "manifest.json").read_text())["extra"]["check"]
