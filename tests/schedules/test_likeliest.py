"""The first of the greatest logits is numpy's, and no number where one is none."""

from __future__ import annotations

import numpy as np

from slmtvm.schedules.likeliest import LikeliestOp, build_chosen, build_parts
from slmtvm.target import Target
from tests.schedules import harness

CPU = Target.load("x86-64-v3")


def found(logits: np.ndarray) -> tuple[float, int]:
    op = LikeliestOp(len(logits))
    assert op.fits and op.parts * op.part_size >= len(logits) >= op.part_size
    parts = harness.run(build_parts(op), {"logits": logits}, CPU)
    given = {name: parts[name] for name in ("greatest", "places")}
    value, place = harness.run(build_chosen(op), given, CPU)["chosen"]
    return float(value), int(place)


def test_the_first_of_the_greatest_is_found_wherever_it_lies() -> None:
    rng = np.random.default_rng(0)
    for count in (16, 101, 5001):
        logits = rng.integers(-3, 3, count).astype(np.float32)  # many are equal
        logits[rng.integers(0, count, 3)] = -np.inf
        assert found(logits) == (logits.max(), int(logits.argmax()))
    for place in (15, 5000):
        logits = rng.standard_normal(5001).astype(np.float32)
        logits[place] = 9
        assert found(logits) == (9, place)


def test_zeros_of_both_signs_are_equal() -> None:
    logits = np.full(101, -1, np.float32)
    logits[40], logits[77] = -0.0, 0.0
    assert found(logits) == (0, 40)


def test_what_is_no_number_is_not_passed_over() -> None:
    logits = np.arange(101, dtype=np.float32)
    logits[37] = np.nan
    assert np.isnan(found(logits)[0])
    assert np.isinf(found(np.full(101, -np.inf, np.float32))[0])
