"""A difference counts where it is beyond its limit and beyond onnxruntime's from itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slmtvm.verify.agreement import Figures, Limits, worst
from slmtvm.verify.metrics import HiddenDifference, LogitsDifference

SAME = Figures(tokens=8, max_abs=0, mean_abs=0, relative=0, cosine=1, kl_mean=0, top1=1)
FAR = {"kl_mean": 0.02, "cosine": 0.98, "relative": 0.3}
FARTHER = {"kl_mean": 0.03, "cosine": 0.97, "relative": 0.4}


@pytest.mark.parametrize("measure", FAR)
def test_each_measure_has_a_limit_of_its_own(measure: str) -> None:
    assert not SAME.excess(Limits())
    (found,) = replace(SAME, **{measure: FAR[measure]}).excess(Limits())
    assert f"{FAR[measure]:.2g}" in found


@pytest.mark.parametrize("measure", FAR)
def test_beyond_a_limit_it_may_be_as_far_as_onnxruntime_is_from_itself(measure: str) -> None:
    own = replace(SAME, **{measure: FAR[measure]})
    assert not own.excess(Limits(), own)
    farther = replace(SAME, **{measure: FARTHER[measure]})
    assert len(farther.excess(Limits(), own)) == 1


def test_an_own_difference_within_the_limits_changes_nothing() -> None:
    assert not replace(SAME, kl_mean=0.009).excess(Limits(), SAME)


def test_the_worst_of_several_is_the_worst_in_every_measure() -> None:
    found = worst([replace(SAME, **FAR), replace(SAME, kl_mean=0.5, top1=0.5)])
    assert (found.kl_mean, found.cosine, found.relative, found.top1) == (0.5, 0.98, 0.3, 0.5)


def test_nearly_uniform_logits_of_another_model_are_told_apart() -> None:
    random = np.random.default_rng(0)
    ours, theirs = random.normal(0, 1e-3, (2, 16, 40)).astype(np.float32)
    total = LogitsDifference()
    total.add_logits(ours, theirs, np.zeros(16, int))
    assert total.figures().kl_mean < 1e-5  # which probabilities alone do not show
    assert len(total.figures().excess(Limits())) == 2


def test_one_wrong_row_among_many_is_seen() -> None:
    theirs = np.random.default_rng(0).normal(size=(500, 40)).astype(np.float32)
    ours = theirs.copy()
    ours[7] = ours[7, ::-1]
    total = HiddenDifference()
    total.add_hidden(ours, theirs)
    (found,) = total.figures().excess(Limits())
    assert "of the range" in found


def test_a_vocabulary_that_is_masked_out_is_no_difference() -> None:
    theirs = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    theirs[:, 8:] = -np.inf
    total = LogitsDifference()
    total.add_logits(theirs.copy(), theirs, np.zeros(4, int))
    assert total.figures() == replace(SAME, tokens=4)
    ours = theirs.copy()
    ours[0, 9] = 0
    total.add_logits(ours, theirs, np.zeros(4, int))
    assert total.figures().excess(Limits())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_disagrees(value: float) -> None:
    theirs = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    ours = theirs.copy()
    ours[2, 3] = value
    for kind in (LogitsDifference, HiddenDifference):
        total = kind()
        if isinstance(total, LogitsDifference):
            total.add_logits(ours, theirs, np.zeros(4, int))
        else:
            total.add_hidden(ours, theirs)
        assert total.figures().excess(Limits())


def test_rows_of_zeros_agree_with_one_another_alone() -> None:
    zeros, ones = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    for ours, cosine in ((zeros, 1.0), (ones, 0.0)):
        total = HiddenDifference()
        total.add_hidden(ours, zeros)
        assert total.figures().cosine == cosine
