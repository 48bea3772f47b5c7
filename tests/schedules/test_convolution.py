"""The causal convolution's kernel against numpy, on every target and in pieces."""

from __future__ import annotations

import numpy as np
import pytest

from slmtvm.schedules.convolution import ConvShape, build
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.harness import run

CHANNELS, CAPACITY = 37, 32


@pytest.fixture(params=EVERY_TARGET)
def target(request: pytest.FixtureRequest) -> Target:
    return Target.load(request.param)


def reference(v: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """v float64 (n, channels) from position 0 on."""
    taps = len(weight)
    padded = np.concatenate([np.zeros((taps - 1, v.shape[1])), v])
    return sum(weight[j] * padded[j : j + len(v)] for j in range(taps)) + bias


@pytest.mark.parametrize(("gated", "taps"), [(True, 3), (False, 4)])
def test_a_step_continues_where_the_cache_ends(target: Target, gated: bool, taps: int) -> None:
    rng = np.random.default_rng(0)
    before, m = 5, 3
    width = 3 * CHANNELS if gated else CHANNELS
    x = rng.standard_normal((before + m, width)).astype(np.float32)
    weight = rng.standard_normal((taps, CHANNELS)).astype(np.float32)
    bias = rng.standard_normal(CHANNELS).astype(np.float32)
    b, c, value = (x[:, i * CHANNELS : (i + 1) * CHANNELS] for i in range(3))
    v = b * value if gated else x
    want = reference(v.astype(np.float64), weight, bias) * (c if gated else 1)
    cache = np.full((CAPACITY, CHANNELS), np.nan, np.float32)

    def step(first: int, rows: int, cuts: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
        shape = ConvShape(rows, CHANNELS, taps, CAPACITY, gated, has_bias=True)
        inputs = {"x": x[first : first + rows], "weight": weight, "bias": bias, "cache": cache}
        return run(build(shape), inputs, target, position=first, cuts=cuts)

    one = step(0, before)
    cache = one["cache"]
    np.testing.assert_array_equal(cache[:before], v[:before])
    assert np.isnan(cache[before:]).all()
    two = step(before, m, cuts=(1,))
    got = np.concatenate([one["y"], two["y"]])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
    np.testing.assert_array_equal(two["cache"][: before + m], v)
