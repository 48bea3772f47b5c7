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
    counts = found.wholes + found.halved
    assert counts.sum() == len(found.places) == len(found.weights)
    again = np.zeros(weight.shape, np.int64)
    np.add.at(again, (np.repeat(np.arange(len(weight)), counts)[:, None], found.places),
              found.weights)  # fmt: skip
    np.testing.assert_array_equal(again, weight)
    kinds = np.stack([found.wholes, found.halved], axis=1).reshape(-1)
    whole = np.tile([True, False], len(weight)).repeat(kinds)
    wide = found.weights.astype(np.int64)
    for terms in (wide[whole], wide[~whole, :2], wide[~whole, 2:]):
        assert (255 * np.maximum(terms, 0).sum(axis=1) < 2**15).all()
        assert (255 * np.minimum(terms, 0).sum(axis=1) >= -(2**15)).all()


def test_groups_are_nearly_full_and_whole_where_weights_are_not_large() -> None:
    for weight in (pruned(9, 0.3), pruned(30, 0.0, positive=True), pruned(110, 0.8)):
        found, used = fours.deal(weight), np.count_nonzero(weight, axis=1)
        assert (found.wholes + found.halved).sum() <= 1.1 * (-(-used // fours.SIZE)).sum()
        assert found.halved.sum() <= found.wholes.sum() / 4


@pytest.mark.parametrize(
    ("weights", "wholes", "halved"),
    [
        ([40, 41, -42, -43], [[41, 40, -43, -42]], []),
        ([30, 31, 32, 33, 0], [[33, 30, 32, 31]], []),
        ([127, 126, -120, -50], [], [[127, -120, 126, -50]]),
        ([127, 126, -50, -51], [], [[127, -51, 126, -50]]),
    ],
)
def test_large_weights_share_half_a_group_with_one_of_the_other_sign(
    weights: list[int], wholes: list[list[int]], halved: list[list[int]]
) -> None:
    found = fours.deal(np.array([weights], np.int8))
    assert (found.wholes.tolist(), found.halved.tolist()) == ([len(wholes)], [len(halved)])
    assert found.weights.tolist() == wholes + halved


def test_no_weights_make_no_groups() -> None:
    found = fours.deal(np.zeros((3, 16), np.int8))
    assert not found.wholes.any() and not found.halved.any() and len(found.places) == 0
