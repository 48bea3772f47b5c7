"""The roundings of a mixture of experts in kernels against numpy, on every target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from slmtvm.ir.experts import Gate, Routing
from slmtvm.ir.reference.experts import (
    Round,
    apply_gate,
    choose_experts,
    mix,
    roundings_of,
)
from slmtvm.schedules import experts, isa
from slmtvm.schedules.experts import RoutedRowOp, RouteOp
from slmtvm.schedules.experts.points import OF_GATE, OF_SUM, Levels
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.harness import run

M, TOP_K, COUNT = 5, 2, 3


@pytest.fixture(params=EVERY_TARGET)
def target(request: pytest.FixtureRequest) -> Target:
    return Target.load(request.param)


def tables(points: Sequence[str], seed: int = 0) -> dict[str, np.ndarray]:
    """Scales and ends of each expert for values of about 1; some values are beyond the ends."""
    rng = np.random.default_rng(seed)
    made = {}
    for point in points:
        scale = rng.uniform(0.01, 0.02, COUNT)
        low = -rng.integers(100, 156, COUNT)
        made[point] = np.stack([scale, low, low + 255], axis=1).astype(np.float32)
    return made


def named(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{point}_rounding": table for point, table in given.items()}


def choices(seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(COUNT)[:TOP_K] for _ in range(M)]).astype(np.int32)


def check_steps(got: np.ndarray, want: np.ndarray, step: float, share: float = 0.01) -> None:
    """Equal but for few values, which another rounding of float32 puts a step beside."""
    off = np.abs(got - want)
    assert off.max() <= 1.01 * step
    assert (off > 1e-5).mean() <= share


@pytest.mark.parametrize(
    ("activation", "points"),
    [
        ("swiglu", OF_GATE),
        ("swiglu", ("gate", "hidden")),
        ("silu", ("up", "sigmoid", "hidden")),
        ("gelu_tanh", ("up", "hidden")),
        ("relu", ("up",)),
    ],
)
@pytest.mark.parametrize("d", [7, 16, 37])
def test_gates_are_rounded_as_the_expert_of_each_row_has_it(
    target: Target, activation: str, points: tuple[str, ...], d: int
) -> None:
    op = RoutedRowOp(M, TOP_K, COUNT, d, activation, points, by_pair=True)
    rng, given, chosen = np.random.default_rng(2), tables(points), choices()
    width = 2 * d if activation == "swiglu" else d
    x = rng.standard_normal((M * TOP_K, width)).astype(np.float32)
    got = run(
        experts.build_row(op), {"x": x, "experts": chosen, **named(given)}, target, cuts=(1, 4)
    )["y"]
    at = roundings_of(given, COUNT)
    want = np.concatenate(
        [
            apply_gate(Gate(activation), x[i : i + 1].astype(np.float64), at[e])
            for i, e in enumerate(chosen.reshape(-1))
        ]
    )
    if "hidden" in points:
        # A step of the sigmoid, or of silu(g), can be several of the result.
        check_steps(got, want, step=0.08, share=0.03)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [7, 16, 37])
def test_rows_of_tokens_become_the_integers_of_each_expert(target: Target, d: int) -> None:
    own = isa.get(target.isa)
    op = RoutedRowOp(
        M, TOP_K, COUNT, d, "identity", ("input",), by_pair=False, storage=own.row_dtype,
        k_multiple=32,
    )  # fmt: skip
    given, chosen = tables(op.points), choices()
    x = np.random.default_rng(3).standard_normal((M, d)).astype(np.float32)
    x[0, :3] = np.nan, np.inf, -np.inf
    got = run(
        experts.build_row(op), {"x": x, "experts": chosen, **named(given)}, target, cuts=(1, 4)
    )
    scale, low, high = given["input"][chosen.reshape(-1)].T[:, :, None]
    levels = np.nan_to_num(np.repeat(x, TOP_K, axis=0) / scale, nan=-np.inf)
    want = np.zeros((M * TOP_K, op.k_padded)) - low
    want[:, :d] += np.rint(np.clip(levels, low, high))
    stored = got["xq"].astype(np.int32) + (128 if own.row_dtype == "int8" else 0)
    np.testing.assert_array_equal(stored, want)
    # Both pairs of the row that holds what is no number have that for their scale.
    np.testing.assert_array_equal(got["xs"][:TOP_K], np.nan)
    np.testing.assert_array_equal(got["xs"][TOP_K:], scale[TOP_K:, 0])
    np.testing.assert_array_equal(got["xz"], -low[:, 0])


@pytest.mark.parametrize(
    "points", [OF_SUM, ("down",), ("weight", "weighted"), ("total",)], ids="-".join
)
@pytest.mark.parametrize("d", [7, 16, 37])
def test_a_sum_is_rounded_before_each_expert_and_rows_behind_the_last_are_zero(
    target: Target, points: tuple[str, ...], d: int
) -> None:
    rng, given, chosen, valid = np.random.default_rng(4), tables(points), choices(), M - 1
    partial = rng.standard_normal((M * TOP_K, d)).astype(np.float32)
    weights = rng.random((M, TOP_K)).astype(np.float32)
    kernel = experts.build_rounded_combine(M, TOP_K, d, COUNT, points)
    inputs = {"partial": partial, "weights": weights, "experts": chosen, **named(given)}
    got = run(kernel, inputs, target, valid=valid, cuts=(1,))["y"]

    def part(name: str, expert: int, rows: np.ndarray) -> np.ndarray:
        """Where the second layer is asked for, the given results of the expert's pairs."""
        return partial[chosen.reshape(-1) == expert].astype(np.float64) if name == "down" else rows

    want = mix(
        np.zeros((M, 1)), chosen, weights.astype(np.float64), part, Gate("identity"), d,
        roundings_of(given, COUNT),
    )  # fmt: skip
    check_steps(got[:valid], want[:valid], step=0.04, share=0.02)
    assert not got[valid:].any()


def test_a_route_rounds_scores_and_their_sum(target: Target) -> None:
    levels: dict[str, Levels] = {
        "scores": (1 / 255, 0, 255),
        "selection": (0.02, -100, 155),
        "sum": (0.007, 0, 255),
        "divisor": (0.008, 0, 255),
    }
    count, top_k = 21, 3
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((4, count)).astype(np.float32)
    bias = rng.standard_normal(count).astype(np.float32)
    op = RouteOp(
        4, count, top_k, "sigmoid", "sum", 1e-6, 1.5, has_bias=True,
        roundings=tuple(levels.items()),
    )  # fmt: skip
    got = run(experts.build_route(op), {"logits": logits, "bias": bias}, target, cuts=(1,))
    at: Round = roundings_of({p: np.array([v]) for p, v in levels.items()}, 1)[0]
    routing = Routing(count, top_k, "sigmoid", "sum", 1e-6, 1.5)
    chosen, weights = choose_experts(logits.astype(np.float64), bias, routing, at)
    np.testing.assert_array_equal(got["experts"], chosen)
    np.testing.assert_allclose(got["weights"], weights, rtol=3e-6)
