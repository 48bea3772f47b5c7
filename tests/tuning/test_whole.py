"""What a whole model says of settings goes before what was measured of kernels alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slmtvm.plan.setup import DEFAULT_SETUP, Setup
from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.tuning.choice import RecordedChoice, chosen_setup
from slmtvm.tuning.records import Line, RecordError, RecordFile, RecordLog, read_lines
from slmtvm.tuning.tasks import TaskKey
from slmtvm.tuning.whole import Confirmation, Provenance, SetupRecord, Turns
from tests.tuning.tasks import HOST, KEY, SHAPE, key, record

ISA = isas.get(HOST.isa)
A: Knobs = {"mr": 1, "nv": 1, "pf": 0, "ku": 16, "gu": 1, "ps": 0}
B: Knobs = {"mr": 1, "nv": 1, "pf": 1, "ku": 16, "gu": 2, "ps": 0}
DEFAULT = linear.default_knobs(SHAPE, ISA)
HERE = Provenance(HOST.name, HOST.isa)
FEW = Setup(chunks=(1, 8, 64))


def turns(ratio: float, phase: str = "decode", count: int = 5) -> Turns:
    return Turns(phase, tuple(ratio + i / 1000 for i in range(count)), (1.0,) * count)


def verdict(ratio: float, knobs: Knobs = A, of: TaskKey = KEY, **fields: Any) -> Confirmation:
    values = {"provenance": HERE, "family": "decode", "turns": turns(ratio), **fields}
    return Confirmation(((of, knobs),), **values)


def division(*parts: Turns, setup: Setup = FEW, **fields: Any) -> SetupRecord:
    values = {"provenance": HERE, **fields}
    return SetupRecord("abc", setup, turns=parts, **values)


def choose(*lines: Line, of: TaskKey = KEY, trial: bool = False) -> tuple[Knobs, bool]:
    choice = RecordedChoice(RecordLog.of(lines), HOST, trial=trial)
    knobs = choice(of.kind, of.shape, ISA)
    return knobs, bool(choice.used and choice.used[0].confirmed)


def test_what_was_confirmed_goes_before_what_was_faster_alone() -> None:
    lines = [record(knobs=A, ratio=0.9), record(knobs=B, ratio=0.5), verdict(0.95)]
    assert choose(*lines) == (A, True)
    assert choose(*lines, trial=True) == (B, False)


def test_of_a_kernel_that_a_whole_model_refuted_nothing_else_is_believed() -> None:
    lines = [record(knobs=A, ratio=0.5), record(knobs=B, ratio=0.6), verdict(1.02)]
    assert choose(*lines) == (DEFAULT, False)
    assert choose(*lines, trial=True) == (B, False)


def test_the_best_confirmed_setting_is_taken_and_the_last_word_counts() -> None:
    assert choose(verdict(0.95), verdict(0.9, B)) == (B, True)
    assert choose(verdict(0.95), verdict(0.9, B), verdict(1.1, B)) == (A, True)


def test_a_refuted_setting_is_lent_to_no_other_shape() -> None:
    near = key(m=1, n=192)
    measured = record(near, knobs=A, ratio=0.7)
    assert choose(measured) == (A, False)
    assert choose(measured, verdict(1.1, of=near)) == (DEFAULT, False)
    assert choose(measured, verdict(1.1)) == (DEFAULT, False)
    assert choose(measured, verdict(0.9, of=near)) == (A, False)


@pytest.mark.parametrize(
    "fields",
    [
        {"failure": "computes other bits than the default", "turns": None},
        {"turns": turns(0.5, count=2)},
        {"turns": Turns("decode", (0.9, 0.9, 1.1, 1.1), (1.0,) * 4)},
    ],
)
def test_a_setting_is_refuted_unless_three_of_four_turns_are_faster(fields: dict[str, Any]) -> None:
    said = verdict(0.9, **fields)
    assert not said.confirmed and "refuted" in str(said)
    assert choose(record(knobs=A), said) == (DEFAULT, False)


def test_another_targets_verdicts_are_not_heard() -> None:
    foreign = replace(HERE, target="cortex-a78")
    assert choose(record(knobs=A), verdict(1.1, provenance=foreign)) == (A, False)


def test_records_of_whole_models_are_read_as_they_were_written(tmp_path: Path) -> None:
    lines: list[Line] = [
        verdict(0.9), record(), verdict(1.1, turns=None, failure="ends"),
        division(turns(0.9, "prefill"), turns(1.0), setup=Setup((1, 32), 0, 3), busy=0.5),
    ]  # fmt: skip
    file = RecordFile(tmp_path / "r.jsonl")
    file.append(lines)
    assert read_lines(file.path) == lines
    assert RecordLog.of(lines).setups == (lines[3],)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"about": "the weather"}, "about 'the weather', which this version does not know"),
        ({"setup": {"chunks": [2, 16], "parallel_bytes": 0, "threads": 0}}, "not 1 and larger"),
        ({"setup": {"chunks": [1, 9999], "parallel_bytes": 0, "threads": 0}}, "9999 rows"),
        ({"turns": []}, "no turns"),
        ({"turns": [{"phase": "p", "seconds": [1], "default_seconds": [0]}]}, "positive"),
        ({"architecture": None, "base": 3}, "subscriptable"),
    ],
)
def test_a_damaged_record_of_a_model_is_refused_by_its_line(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    table = {**json.loads(division(turns(0.9)).to_json()), **change}
    path.write_text(record().to_json() + "\n" + json.dumps(table) + "\n")
    with pytest.raises(RecordError, match=f"r.jsonl:2: .*{message}"):
        read_lines(path)


def test_a_model_is_divided_as_was_fastest_and_not_slower_in_any_phase() -> None:
    many, threads = Setup(chunks=(1, 32, 256)), Setup(threads=1)
    records = [
        division(turns(0.9, "prefill")),
        division(turns(0.7, "prefill"), turns(1.1), setup=many),
        division(turns(0.5, "prefill"), setup=Setup((1, 16, 64)), base=many),
        division(turns(0.5), setup=threads, busy=1.5),
    ]
    assert chosen_setup(records, "abc", HOST) == FEW
    assert chosen_setup(records, "another", HOST) == DEFAULT_SETUP
    assert chosen_setup([*records, *[division(turns(1.1, "prefill"))] * 2], "abc", HOST) == (
        DEFAULT_SETUP
    )


def test_threads_are_not_judged_while_others_compute() -> None:
    setup = Setup(threads=1)
    assert division(turns(0.5), setup=setup).faster
    disturbed = division(turns(0.5), setup=setup, busy=1.5)
    assert not disturbed.faster and "1.5 cores busy with other things" in str(disturbed)
    assert division(turns(0.5), busy=1.5).faster  # chunks alone: both sides had the same
