"""Groups of four weights hold every weight once and sum in 16 bits."""

from __future__ import annotations

import numpy as np
import pytest

from slmtvm.schedules.linear import fours


def pruned(largest: int, share: float, positive: bool = False) -> np.ndarray:
    """Normal weights (40, 200), the largest ``largest``, ``share`` of them, the smallest, zero."""
    weight = np.random.default_rng(largest).standard_normal((40, 200))
    weight = np.abs(weight) if positive else weight
    weight[np.abs(weight) < np.quantile(np.abs(weight), share)] = 0
    return np.round(weight / np.abs(weight).max() * largest).astype(np.int8)


def extreme() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.choice(np.array([-128, -127, -1, 0, 1, 127], np.int8), (9, 50))


@pytest.mark.parametrize(
    "weight",
    [pruned(127, 0.8), pruned(127, 0.5, positive=True), pruned(9, 0.3), extreme()],
    ids=["signs", "one sign", "small", "extreme"],
)
def test_every_weight_is_in_one_group_that_fits_int16(weight: np.ndarray) -> None:
    found = fours.deal(weight)
    assert found.counts.sum() == len(found.places) == len(found.weights)
    again = np.zeros(weight.shape, np.int64)
    channels = np.repeat(np.arange(len(weight)), found.counts)
    np.add.at(again, (channels[:, None], found.places), found.weights)
    np.testing.assert_array_equal(again, weight)
    wide = found.weights.astype(np.int64)
    assert (255 * np.maximum(wide, 0).sum(axis=1) < 2**15).all()
    assert (255 * np.minimum(wide, 0).sum(axis=1) >= -(2**15)).all()


def test_groups_are_nearly_full_where_weights_are_not_large() -> None:
    for weight in (pruned(9, 0.3), pruned(30, 0.0, positive=True), pruned(110, 0.8)):
        counts, used = fours.deal(weight).counts, np.count_nonzero(weight, axis=1)
        assert counts.sum() <= 1.1 * (-(-used // fours.SIZE)).sum()


def test_uneven_signs_share_groups_three_to_one() -> None:
    found = fours.deal(np.array([[40, 41, 42, -90, 0]], np.int8))
    assert found.counts.tolist() == [1]
    assert sorted(found.weights[0].tolist()) == [-90, 40, 41, 42]


def test_no_weights_make_no_groups() -> None:
    found = fours.deal(np.zeros((3, 16), np.int8))
    assert found.counts.tolist() == [0, 0, 0] and found.places.shape == (0, fours.SIZE)
