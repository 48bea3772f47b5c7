"""What each method loses of a layer's output."""

from __future__ import annotations

import numpy as np
import pytest

from slmtvm.prune.methods import magnitude, sparsegpt, wanda
from slmtvm.prune.patterns import parse_pattern


def layer() -> tuple[np.ndarray, np.ndarray]:
    """A weight (24, 70), and inputs (500, 70) that depend on each other and differ in size."""
    random = np.random.default_rng(3)
    mixed = random.normal(size=(500, 70)) @ random.normal(size=(70, 70)) / 8
    return random.normal(size=(24, 70)), (mixed * random.uniform(0.1, 3, 70)).astype(np.float64)


@pytest.mark.parametrize("text", ["2:4", "1:4", "block:8x4", "free"])
def test_looking_at_inputs_loses_less_and_making_up_for_it_least(text: str) -> None:
    weight, x = layer()
    pattern, moment = parse_pattern(text, None), x.T @ x / len(x)
    outputs = [
        magnitude(weight, pattern), wanda(weight, moment, pattern),
        sparsegpt(weight, moment, pattern),
    ]  # fmt: skip
    by_size, by_input, made_up = (np.square(x @ (w - weight).T).mean() for w in outputs)
    assert made_up < by_input
    assert by_input < by_size


@pytest.mark.parametrize("text", ["2:4", "block:8x4", "free"])
@pytest.mark.parametrize("k", [70, 64, 5])
def test_what_is_pruned_has_the_pattern_where_k_is_no_multiple_of_it(text: str, k: int) -> None:
    weight, x = layer()
    weight, x = weight[:, :k], x[:, :k]
    pruned = sparsegpt(weight, x.T @ x / len(x), parse_pattern(text, None))
    assert pruned.shape == weight.shape
    if text == "2:4":
        zeros = np.pad(pruned == 0, ((0, 0), (0, -k % 4)), constant_values=True)
        assert (zeros.reshape(24, -1, 4).sum(axis=2) >= 2).all()
    elif text == "block:8x4":
        blocks = np.pad(pruned, ((0, 0), (0, -k % 4))).reshape(3, 8, -1, 4)
        gone = (blocks == 0).all(axis=(1, 3))
        assert gone.any() and (blocks != 0).any(axis=(1, 3))[~gone].all()
    else:
        assert (pruned == 0).mean() == pytest.approx(0.5, abs=0.11)


def test_inputs_that_are_never_there_take_no_weight_from_the_others() -> None:
    weight, x = layer()
    x[:, :8] = 0
    pruned = sparsegpt(weight, x.T @ x / len(x), parse_pattern("free", None))
    assert np.isfinite(pruned).all()
    assert np.square(x @ (pruned - weight).T).mean() < np.square(x @ weight.T).mean()
