"""Records keep what was measured, and damaged ones are named by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slmtvm.schedules.experts import RoutedShape
from slmtvm.tuning.records import (
    RecordError,
    RecordFile,
    merge_records,
    read_records,
)
from slmtvm.tuning.show import table
from slmtvm.tuning.tasks import TaskKey
from tests.tuning.tasks import SHAPE, key, record

RECORDS = [
    record(),
    record(key(m=3), device={"cpu": "x", "features": ["avx2"]}, versions={"slmtvm": "1"}),
    record(seconds=(), default_seconds=(), failure="does not come back"),
    record(TaskKey("routed_linear", RoutedShape(2, 2, 4, SHAPE, by_pair=True))),
]


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "a.jsonl")
    for made in RECORDS:
        file.append([made])
    assert read_records(file.path) == RECORDS


def test_a_line_that_was_not_written_to_its_end_is_left_out_and_taken_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(RECORDS[0].to_json() + "\n" + RECORDS[1].to_json()[:100])
    assert read_records(path) == RECORDS[:1]
    RecordFile(path).append(RECORDS[2:])
    assert read_records(path) == [RECORDS[0], *RECORDS[2:]]


def _without(name: str) -> str:
    table = json.loads(RECORDS[0].to_json())
    del table[name]
    return json.dumps(table)


def _with(**changes: Any) -> str:
    return json.dumps({**json.loads(RECORDS[0].to_json()), **changes})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Expecting property name"),
        ("[]", "no record"),
        (_without("knobs"), "lacks 'knobs'"),
        (_without("format"), "lacks 'format'"),
        (_with(format=9), "another format"),
        (_with(seconds=[1.0]), "must be as many"),
        (_with(seconds=[-1.0] * 5), "positive"),
        (_with(seconds=[], default_seconds=[]), "neither seconds nor a failure"),
        (_with(knobs={"mr": "many"}), "invalid literal"),
        (_with(task={"kind": "nothing", "shape": {}}), "lacks 'nothing'"),
        (_with(task={"kind": "linear", "shape": {"m": 1}}), "missing"),
        (_with(colour="blue"), "colour"),
    ],
)
def test_a_damaged_line_is_an_error_that_names_it(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(RECORDS[0].to_json() + "\n" + line + "\n")
    with pytest.raises(RecordError, match=r"a\.jsonl:2: no record: ") as caught:
        read_records(path)
    assert words in str(caught.value)


def test_merging_keeps_every_record_once(tmp_path: Path) -> None:
    a, b, out = (tmp_path / name for name in ("a", "b", "out"))
    RecordFile(a).append(RECORDS[:3])
    RecordFile(b).append(RECORDS[2:])
    assert merge_records([a, b], out) == len(RECORDS)
    assert read_records(out) == RECORDS


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be written: Is a directory"):
        RecordFile(tmp_path).append(RECORDS)
    with pytest.raises(RecordError, match="cannot be written"):
        merge_records([], tmp_path / "none" / "out")


def test_the_table_shows_the_fastest_setting_and_counts_failures() -> None:
    shown = table([*RECORDS, record(ratio=0.25, knobs={"mr": 1, "nv": 4})])
    line = next(x for x in shown.splitlines() if "linear_int4_block_m1_n96_k64" in x)
    assert line.split() == [
        "linear_int4_block_m1_n96_k64", "1000000.0", "us", "4.000", "3", "1", "mr1", "nv4",
    ]  # fmt: skip
    every = table(RECORDS, every=True)
    assert "does not come back" in every


def test_a_ratio_is_the_median_of_rounds_and_infinite_for_a_failure() -> None:
    assert record(ratio=0.5).ratio == pytest.approx(0.5)
    assert RECORDS[2].ratio == float("inf")
    assert RECORDS[0].ratios and not RECORDS[2].ratios
