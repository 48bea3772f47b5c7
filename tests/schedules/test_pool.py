"""Pooled rows are exactly those of the reference, at sizes that are not round, on every target."""

from __future__ import annotations

import numpy as np
import pytest

from slmtvm.schedules.pool import HOW, PoolOp, build, reference
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.harness import run

ROWS = 9
_MORE = [pytest.param(d, marks=pytest.mark.exhaustive) for d in (16, 37)]


@pytest.fixture(params=EVERY_TARGET)
def target(request: pytest.FixtureRequest) -> Target:
    return Target.load(request.param)


def _inputs(d: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(d)
    limits = np.where(rng.random(ROWS + 3) < 0.5, np.float32(-1e30), np.float32(np.inf))
    limits[1] = np.inf
    x = rng.standard_normal((ROWS, d)).astype(np.float32)
    x[ROWS - 1] = np.nan  # behind the valid rows, and read by none
    return {"x": x, "limits": limits}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("d", [7, 96, *_MORE])
@pytest.mark.parametrize("how", HOW)
def test_a_pooled_row_is_that_of_the_valid_and_visible_rows(
    how: str, d: int, masked: bool, target: Target
) -> None:
    op = PoolOp(how, ROWS, d, ROWS + 3 if masked else 0)
    given = {t: _inputs(d)[t] for t in ("x", *(tensor.name for tensor in op.limits))}
    for valid in (2, ROWS - 1):
        got = run(build(op), given, target, valid=valid, cuts=(1,))
        np.testing.assert_array_equal(got["y"], reference(op, given, valid))


def test_the_mean_of_rows_does_not_depend_on_how_many_there_are_room_for(target: Target) -> None:
    x = np.random.default_rng(0).standard_normal((40, 37)).astype(np.float32)
    few = run(build(PoolOp("mean", 9, 37)), {"x": x[:9]}, target, valid=9)["y"]
    many = run(build(PoolOp("mean", 40, 37)), {"x": x}, target, valid=9)["y"]
    np.testing.assert_array_equal(few, many)
