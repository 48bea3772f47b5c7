"""Records that come with the package are taken where none are given, and the manifest says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slmtvm.compiler import compile_imported
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.schedules import isa as isas
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from slmtvm.tuning import shipped
from slmtvm.tuning.records import Record, RecordFile, RecordLog
from slmtvm.tuning.shipped import shipped_records
from slmtvm.tuning.tasks import TaskKey, Workload, tuning_tasks
from tests.passes import toy
from tests.tuning.tasks import HOST, record


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """The one record that is shipped: of a layer of the toy decoder, for this machine."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    layer = _layer()
    settings = TEMPLATES["linear"].settings(layer.shape, isas.get(HOST.isa))
    made = record(layer, knobs=settings[1])
    RecordFile(tmp_path / f"{HOST.name}.jsonl").append([made])
    return made


def _layer() -> TaskKey:
    plan = build_plan(lower(fuse(toy.decoder("int4")), HOST), {})
    tasks = tuning_tasks(plan, Workload())
    return next(t.key for t in tasks if t.key.kind == "linear" and t.key.shape.m == 1)


def tuned(folder: Path, records: RecordLog | None) -> list[dict[str, Any]] | None:
    """What a compile of the toy decoder says of its kernels."""
    source = folder / "toy.onnx"
    source.write_bytes(b"stands for the file")
    model = replace(toy.decoder("int4"), source=source)
    bundle = compile_imported(
        model, [HOST], output=folder / "out.slm", check=False, records=records
    )  # fmt: skip
    found = bundle.manifest.extra.get("tuning")
    return None if found is None else list(found[HOST.name])


@pytest.mark.slow
def test_records_that_come_with_the_package_are_taken(own: Record, tmp_path: Path) -> None:
    (entry,) = [e for e in tuned(tmp_path, None) or [] if e["origin"] == "record"]
    assert entry["task"] == own.key.label and entry["knobs"] == own.knobs
    assert entry["shipped"] is True


@pytest.mark.slow
def test_records_that_are_given_take_their_place(own: Record, tmp_path: Path) -> None:
    assert tuned(tmp_path, RecordLog()) is None
    (entry,) = [
        e for e in tuned(tmp_path, RecordLog.of([own])) or [] if e["origin"] == "record"
    ]  # fmt: skip
    assert entry["shipped"] is False


def test_each_target_has_its_own(own: Record) -> None:
    assert shipped_records([HOST, HOST]).kernels == (own,)
    assert not shipped_records([Target.load("riscv64-rvv")])


def test_every_shipped_file_is_of_a_target_and_its_settings_are_known() -> None:
    names = [path.name for path in shipped.FOLDER.iterdir()] if shipped.FOLDER.is_dir() else []
    for target in (Target.load(name.removesuffix(".jsonl")) for name in names):
        log = shipped_records([target])
        assert log
        given = [(c.key, c.knobs) for c in log.kernels]
        for confirmation in log.confirmations:
            assert confirmation.confirmed and confirmation.provenance.target == target.name
            given += confirmation.settings
        for task, knobs in given:
            space = TEMPLATES[task.kind].knob_space(task.shape, isas.get(target.isa))
            assert knobs.keys() == space.keys()
