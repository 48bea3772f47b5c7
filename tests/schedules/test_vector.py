"""The portable vector functions are accurate, and the same on every target in every bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.target import Target
from tests.machines import runnable_targets
from tests.schedules.harness import run

COUNT = 4096
Function = Callable[[np.ndarray], np.ndarray]


def elementwise(name: str, function: Callable[[vec.Expr], vec.Expr]) -> Kernel:
    def body(block: vec.Expr, x: vec.Buffer, y: vec.Buffer) -> None:
        vec.store(y, block * vec.LANES, function(vec.load(x, block * vec.LANES)))

    tensors = [Tensor("x", (COUNT,), "float32"), Tensor("y", (COUNT,), "float32")]
    return define(name, tensors, body, grid=COUNT // vec.LANES, outputs=["y"])


def samples() -> np.ndarray:
    rng = np.random.default_rng(0)
    wide = np.linspace(-87, 87, COUNT // 2)
    return np.concatenate([wide, rng.standard_normal(COUNT - COUNT // 2)]).astype(np.float32)


@pytest.mark.parametrize(
    ("kernel", "reference", "ulp"),
    [
        (elementwise("exp", vec.exp), np.exp, 1.0),
        (elementwise("sigmoid", vec.sigmoid), lambda x: 1 / (1 + np.exp(-x)), 2.0),
        (elementwise("erf", vec.erf), np.vectorize(math.erf), 4.0),
        (elementwise("tanh", vec.tanh), np.tanh, 4.0),
    ],
    ids=["exp", "sigmoid", "erf", "tanh"],
)
def test_a_function_is_accurate_and_equal_everywhere(
    kernel: Kernel, reference: Function, ulp: float
) -> None:
    x = samples()
    expected = reference(x.astype(np.float64))
    results = [run(kernel, {"x": x}, target)["y"] for target in runnable_targets()]
    error = np.abs(results[0] - expected) / np.spacing(np.abs(expected).astype(np.float32))
    assert error.max() <= ulp
    for other in results[1:]:
        np.testing.assert_array_equal(other.view(np.uint32), results[0].view(np.uint32))


def test_exp_ends_in_zero_and_in_a_finite_number() -> None:
    x = np.full(COUNT, -87.4, np.float32)
    x[:4] = -np.inf, np.inf, 100.0, -1e30
    y = run(elementwise("exp", vec.exp), {"x": x}, Target.load("x86-64-v3"))["y"]
    assert y[0] == y[3] == y[-1] == 0.0
    assert np.isfinite(y).all() and y[1] == y[2] > 2e38


@pytest.mark.parametrize("count", [1, 7, 16, 31, 80])
def test_pieces_cover_each_element_once(count: int) -> None:
    covered = [at + lane for at, lanes in vec.pieces(count) for lane in range(lanes)]
    assert covered == list(range(count))
