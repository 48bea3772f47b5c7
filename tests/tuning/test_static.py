"""Settings are ranked by their code, for targets that this machine cannot run too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from slmtvm.schedules import isa as isas
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from slmtvm.tuning import static
from slmtvm.tuning.choice import RecordedChoice
from slmtvm.tuning.records import Line, RecordFile, RecordLog, read_log
from slmtvm.tuning.static import INSTRUCTIONS, StaticModel
from slmtvm.tuning.static_record import StaticRecord
from slmtvm.tuning.tasks import TaskKey
from tests.cli.command import slmtvm
from tests.models import model_path
from tests.tuning.tasks import HOST, ROWS, key, record

KEY = TaskKey("linear", replace(ROWS, m=16))
ISA = isas.get(HOST.isa)
DEFAULT, *OTHERS = TEMPLATES["linear"].settings(KEY.shape, ISA)


@pytest.mark.parametrize("name", [HOST.name, "cortex-a78", "riscv64-rvv"])
def test_code_that_spills_costs_more_than_the_default(name: str) -> None:
    target = Target.load(name)
    judge = StaticModel(target)
    template, isa = TEMPLATES["linear"], isas.get(target.isa)
    shape = replace(KEY.shape, n=512, k=512)
    every = template.settings(shape, isa)
    largest = max(every, key=lambda k: (k["mr"] * k["nv"], k["ku"]))
    smallest = min(every, key=lambda k: (k["mr"] * k["nv"], k["ku"]))
    default, spilled, single = judge.costs(TaskKey("linear", shape), [every[0], largest, smallest])
    assert 0 < default <= single
    assert default < spilled


def test_without_llvm_mca_instructions_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "_llvm_mca", lambda: None)
    judge = StaticModel(HOST)
    assert judge.by == INSTRUCTIONS
    assert all(cost > 0 for cost in judge.costs(KEY, [DEFAULT, OTHERS[0]]))


@pytest.mark.skipif(
    not static._llvm_mca(), reason="llvm-mca is missing: apt-get install llvm"
)  # fmt: skip
def test_llvm_mca_is_asked_for_the_core_of_the_target() -> None:
    assert StaticModel(Target.load("cortex-a78")).by.startswith("llvm-mca ")


def costs(ratio: float, at: int = 0, of: TaskKey = KEY) -> StaticRecord:
    return StaticRecord(of, OTHERS[at], HOST.name, HOST.isa, ratio, INSTRUCTIONS)


def chosen(lines: Sequence[Line], of: TaskKey = KEY) -> str:
    choice = RecordedChoice(RecordLog.of(lines), HOST)
    knobs = choice(of.kind, of.shape, ISA)
    if not choice.used:
        return "default"
    return f"{choice.used[0].origin} {OTHERS.index(knobs)}"


def test_what_was_measured_goes_before_what_code_says() -> None:
    assert chosen([costs(0.75), costs(0.7, 1)]) == "static 1"
    assert chosen([costs(0.7), record(KEY, knobs=OTHERS[1], ratio=0.95)]) == "record 1"
    assert chosen([costs(0.7), record(KEY, knobs=OTHERS[0], ratio=1.05)]) == "default"
    assert chosen([costs(0.85)]) == "default"


def test_of_a_single_row_code_says_nothing() -> None:
    one = key(m=1)
    settings = TEMPLATES["linear"].settings(one.shape, ISA)
    told = StaticRecord(one, settings[1], HOST.name, HOST.isa, 0.5, INSTRUCTIONS)
    assert chosen([told], one) == "default"


def test_static_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "r.jsonl")
    file.append([costs(0.5), record()])
    assert read_log(file.path).statics == (costs(0.5),)


@pytest.mark.slow
def test_a_model_is_ranked_for_a_board_that_is_not_at_hand(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    result = slmtvm(
        "tune", model_path("demo"), "--target", "cortex-a78", "--static", "--trials", "2",
        "--context", "64", "--records", path,
    )  # fmt: skip
    assert "nothing was measured" in result.stdout
    log = read_log(path)
    assert log.statics and not log.kernels
    assert {r.target for r in log.statics} == {"cortex-a78"}
