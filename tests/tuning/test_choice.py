"""A compile takes the best record, else a near one, and never what may be slower."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.target import Target
from slmtvm.tuning.choice import RecordedChoice, shape_distance
from slmtvm.tuning.records import Record, RecordLog
from slmtvm.tuning.tasks import TaskKey
from tests.tuning.tasks import HOST, KEY, SHAPE, key, record

ISA = isas.get(HOST.isa)
A: Knobs = {"mr": 1, "nv": 1, "pf": 0, "ku": 16, "gu": 1, "ps": 0}
B: Knobs = {"mr": 1, "nv": 1, "pf": 1, "ku": 16, "gu": 2, "ps": 0}
DEFAULT = linear.default_knobs(SHAPE, ISA)


def choose(*records: Record, of: TaskKey = KEY) -> tuple[Knobs, str]:
    choice = RecordedChoice(RecordLog.of(records), HOST)
    knobs = choice(of.kind, of.shape, ISA)
    return knobs, choice.used[0].origin if choice.used else "default"


def test_the_fastest_setting_is_taken() -> None:
    assert choose(record(knobs=A, ratio=0.9), record(knobs=B, ratio=0.8)) == (B, "record")


def test_nothing_recorded_means_the_default() -> None:
    assert choose() == (DEFAULT, "default")


@pytest.mark.parametrize(
    "fields",
    [
        {"ratio": 1.1},
        {"ratio": 0.98, "spread": 0.05},  # one round of four is slower
        {"target": "cortex-a78"},
        {"isa": "neon"},
        {"seconds": (0.5, 0.5), "default_seconds": (1.0, 1.0)},
        {"seconds": (), "default_seconds": (), "failure": "ends with signal 11"},
        {"knobs": {**A, "unknown": 1}},
    ],
)
def test_what_may_be_slower_or_is_of_something_else_is_not_taken(fields: dict[str, Any]) -> None:
    assert choose(record(**{"knobs": A, **fields})) == (DEFAULT, "default")


def test_all_records_of_a_setting_count_together() -> None:
    lucky = record(knobs=A, ratio=0.7)
    assert choose(lucky, *[record(knobs=A, ratio=1.05)] * 2) == (DEFAULT, "default")


def test_a_setting_that_failed_once_is_not_taken() -> None:
    failed = record(knobs=A, seconds=(), default_seconds=(), failure="computes other bytes")
    assert choose(record(knobs=A), failed) == (DEFAULT, "default")


def test_the_nearest_shape_stands_in_where_there_is_no_record() -> None:
    near, nearer = key(m=1, n=384), key(m=1, n=192)
    records = [record(near, knobs=A, ratio=0.7), record(nearer, knobs=B, ratio=0.9)]
    assert choose(*records) == (B, "nearest")
    assert choose(*records, record(ratio=1.2, knobs=A)) == (DEFAULT, "default")


@pytest.mark.parametrize(
    "other",
    [{"m": 2}, {"format": "int8"}, {"group_size": 64}, {"n": 96 * 8}, {"scale_dtype": "float32"}],
)
def test_another_kind_of_layer_or_a_far_one_does_not_stand_in(other: dict[str, Any]) -> None:
    assert choose(record(key(**{"m": 1, **other}), knobs=A)) == (DEFAULT, "default")


def test_a_near_shape_must_gain_clearly() -> None:
    near = key(m=1, n=192)
    assert choose(record(near, knobs=A, ratio=0.99, spread=0.001)) == (DEFAULT, "default")


def test_settings_are_cut_to_the_shape_that_takes_them() -> None:
    many = {**A, "mr": 8}
    near = record(key(m=8, has_bias=False, has_residual=False), knobs=many)
    assert choose(near, of=key(m=4))[0] == {**A, "mr": 4}


def test_distance_is_in_powers_of_two_and_infinite_between_kinds() -> None:
    assert shape_distance(key(n=96), key(n=384)) == 2
    assert shape_distance(key(), key(has_bias=False)) == 0
    assert shape_distance(key(m=1), key(m=2)) == float("inf")


def test_records_of_another_target_are_not_read() -> None:
    foreign = Target.load("cortex-a78")
    choice = RecordedChoice(RecordLog.of([record(knobs=A)]), foreign)
    assert choice("linear", SHAPE, isas.get(foreign.isa)) == linear.default_knobs(
        SHAPE, isas.get(foreign.isa)
    )
    assert not choice.used


def test_a_choice_is_noted_once_for_all_layers_of_a_task() -> None:
    choice = RecordedChoice(RecordLog.of([record(knobs=A)]), HOST)
    for _ in range(3):
        choice("linear", replace(SHAPE), ISA)
    (chosen,) = choice.used
    assert chosen.to_json()["task"] == KEY.label
