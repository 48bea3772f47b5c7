"""Sums and products of rows are exact at sizes that are not round."""

from __future__ import annotations

import numpy as np
import pytest

from slmtvm.schedules.elementwise import (
    build_add,
    build_add_positions,
    build_earlier,
    build_multiply,
    build_position_rows,
    build_segments,
)
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.harness import run


@pytest.fixture(params=EVERY_TARGET)
def target(request: pytest.FixtureRequest) -> Target:
    return Target.load(request.param)


def test_add_adds_rows(target: Target) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 3, 103)).astype(np.float32)
    got = run(build_add(3, 103), {"a": a, "b": b}, target, cuts=(1,))
    np.testing.assert_array_equal(got["y"], a + b)


def test_add_positions_adds_the_rows_from_the_position_on(target: Target) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 37)).astype(np.float32)
    table = rng.standard_normal((20, 37)).astype(np.float32)
    got = run(build_add_positions(3, 37, 20), {"x": x, "table": table}, target, position=7)
    np.testing.assert_array_equal(got["y"], x + table[7:10])


def test_position_rows_are_those_from_the_position_on(target: Target) -> None:
    table = np.random.default_rng(0).standard_normal((20, 37)).astype(np.float32)
    got = run(build_position_rows(3, 37, 20), {"table": table}, target, position=7, cuts=(2,))
    np.testing.assert_array_equal(got["y"], table[7:10])


@pytest.mark.parametrize("by", [1, 37])
def test_multiply_takes_a_factor_for_each_row_or_each_element(target: Target, by: int) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3, 37)).astype(np.float32)
    b = rng.standard_normal((3, by)).astype(np.float32)
    got = run(build_multiply(3, 37, by), {"a": a, "b": b}, target, cuts=(1,))
    np.testing.assert_array_equal(got["y"], a * b)


def test_segments_are_those_from_the_position_on(target: Target) -> None:
    segments = np.random.default_rng(0).integers(0, 2, 20).astype(np.int32)
    got = run(build_segments(3, 20), {"segments": segments}, target, position=7)
    np.testing.assert_array_equal(got["y"], segments[7:10])


@pytest.mark.parametrize("first", [None, 9])
def test_earlier_tokens_follow_the_first_or_the_last_valid_one(
    target: Target, first: int | None
) -> None:
    tokens = np.arange(20, 28, dtype=np.int32)
    got = run(build_earlier(8, first), {"tokens": tokens}, target, valid=5)
    np.testing.assert_array_equal(got["y"], [24 if first is None else first, *range(20, 27)])
