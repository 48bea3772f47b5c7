"""What a pattern keeps, and what it is called."""

from __future__ import annotations

import numpy as np
import pytest

from slmtvm.errors import SlmError
from slmtvm.prune.patterns import parse_pattern

SCORES = np.random.default_rng(0).random((16, 48))


@pytest.mark.parametrize(("text", "kept", "step"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8)])
def test_so_many_of_neighbours_stay_and_these_are_the_largest(text, kept, step):
    stays = parse_pattern(text, None).keep(SCORES).reshape(16, -1, step)
    scores = SCORES.reshape(16, -1, step)
    assert (stays.sum(axis=2) == kept).all()
    least = np.where(stays, scores, np.inf).min(axis=2)
    assert (least > np.where(stays, -np.inf, scores).max(axis=2)).all()


def test_whole_blocks_stay_or_go():
    stays = parse_pattern("block:8x4", 0.75).keep(SCORES[:, :40])
    blocks = stays.reshape(2, 8, 10, 4).transpose(0, 2, 1, 3).reshape(20, 32)
    assert (blocks == blocks[:, :1]).all()
    assert blocks[:, 0].sum() == 5


def test_a_matrix_may_end_within_a_block_of_channels():
    stays = parse_pattern("block:8x4", 0.5).keep(SCORES[:13])
    assert stays.shape == (13, 48)
    assert 0.3 < stays.mean() < 0.7


def test_the_largest_of_each_row_stay_wherever_they_are():
    stays = parse_pattern("free", 0.8).keep(SCORES)
    assert (stays.sum(axis=1) == 48 - round(0.8 * 48)).all()


@pytest.mark.parametrize(
    ("text", "sparsity", "message"),
    [
        ("4:2", None, "the first number must be less"),
        ("2:4", 0.75, "has a sparsity of 0.5"),
        ("block:8x100", None, "1 to 64 values of k"),
        ("free", 1.5, "between 0 and 1"),
        ("diagonal", None, "there are n:m"),
    ],
)
def test_what_is_no_pattern_is_refused(text, sparsity, message):
    with pytest.raises(SlmError, match=message):
        parse_pattern(text, sparsity)
