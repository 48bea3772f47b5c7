"""The kernels of a mixture of experts against numpy, on every target and at awkward sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slmtvm.ir.experts import Routing
from slmtvm.ir.reference.experts import choose_experts
from slmtvm.schedules import experts, isa, linear
from slmtvm.schedules.experts import Grouping, RoutedShape, RouteOp
from slmtvm.schedules.linear import LinearShape
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.harness import run
from tests.schedules.linear_cases import random_case


@pytest.fixture(params=EVERY_TARGET)
def target(request: pytest.FixtureRequest) -> Target:
    return Target.load(request.param)


def route(op: RouteOp, logits: np.ndarray, bias: np.ndarray | None, target: Target) -> list:
    inputs = {"logits": logits} | ({} if bias is None else {"bias": bias})
    got = run(experts.build_route(op), inputs, target, cuts=(1,))
    return [got["experts"], got["weights"]]


@pytest.mark.parametrize(
    ("score", "normalize", "biased"),
    [("softmax", "none", False), ("sigmoid", "sum", True), ("none", "softmax", False)],
)
def test_a_token_goes_to_its_largest_scores(
    target: Target, score: str, normalize: str, biased: bool
) -> None:
    rng = np.random.default_rng(0)
    m, count, top_k = 4, 37, 5
    logits = (rng.standard_normal((m, count)) * 3 - 20).astype(np.float32)
    bias = rng.standard_normal(count).astype(np.float32) if biased else None
    op = RouteOp(m, count, top_k, score, normalize, 1e-6, 2.5, biased)
    got = route(op, logits, bias, target)
    routing = Routing(count, top_k, score, normalize, 1e-6, 2.5)
    chosen, weights = choose_experts(logits.astype(np.float64), bias, routing)
    np.testing.assert_array_equal(got[0], chosen)
    np.testing.assert_allclose(got[1], weights, rtol=3e-6)


def test_equal_scores_take_the_lower_expert_and_no_numbers_take_one_that_exists() -> None:
    logits = np.array([[1, 2, 2, 2, 0], [np.nan] * 5, [-np.inf] * 5], np.float32)
    op = RouteOp(3, 5, 2, "none", "softmax")
    chosen, weights = route(op, logits, None, Target.load("host"))
    assert chosen[0].tolist() == [1, 2] and weights[0].tolist() == [0.5, 0.5]
    assert ((chosen >= 0) & (chosen < 5)).all()


@pytest.mark.parametrize("valid", [0, 1, 6, 7])
def test_every_pair_is_in_one_tile_of_its_expert(valid: int) -> None:
    op = Grouping(m=7, top_k=3, experts=5, rows=4)
    chosen = np.random.default_rng(1).integers(0, 4, (7, 3)).astype(np.int32)
    chosen[:, 0] = 2  # a full tile, and one expert that nobody chose
    got = run(experts.build_group(op), {"experts": chosen}, Target.load("host"), valid=valid)
    seen: list[int] = []
    for expert, pairs in zip(got["tile_expert"], got["tile_pairs"], strict=True):
        if expert >= 0:
            distinct = list(dict.fromkeys(pairs.tolist()))
            assert pairs.tolist() == distinct + [distinct[-1]] * (4 - len(distinct))
            assert all(chosen.flat[p] == expert for p in distinct)
            seen += distinct
    assert sorted(seen) == list(range(valid * 3))
    assert (np.diff(got["tile_expert"][got["tile_expert"] >= 0]) >= 0).all()


LAYERS = {
    "f32": LinearShape(1, 37, 41, "f32", has_bias=True),
    "int4": LinearShape(1, 37, 72, "int4", "block", 32, has_zero_points=True),
    "int4 on floats": LinearShape(1, 37, 72, "int4", "f32", 32),
    "int8": LinearShape(1, 37, 41, "int8", "row_u8"),
    "in blocks": LinearShape(1, 40, 41, "int4", group_channels=8, has_zero_points=True),
}


@pytest.mark.parametrize(
    ("name", "m", "by_pair"),
    [
        pytest.param("f32", 1, False, marks=pytest.mark.slow),
        ("f32", 7, True),
        pytest.param("int4", 7, False, marks=pytest.mark.slow),
        pytest.param("int4 on floats", 1, True, marks=pytest.mark.slow),
        ("int8", 7, True),
        pytest.param("in blocks", 1, False, marks=pytest.mark.slow),
        ("in blocks", 7, True),
    ],
)
def test_each_pair_is_multiplied_by_its_expert_with_the_bits_of_that_layer_alone(
    target: Target, name: str, m: int, by_pair: bool
) -> None:
    own, top_k, count = isa.get(target.isa), 2, 3
    shape = RoutedShape(m, top_k, count, LAYERS[name], by_pair)
    rng = np.random.default_rng(0)
    chosen = np.stack([rng.permutation(count)[:top_k] for _ in range(m)]).astype(np.int32)
    rows = shape.stacked(own).m
    cases = [random_case(replace(shape.layer, m=rows), own, seed=i) for i in range(count)]
    activations = cases[0].activations
    stacked = {key: np.stack([c.weights[key] for c in cases]) for key in cases[0].weights}
    inputs = {**activations, **experts.pack(shape, own, linear.Weights(**stacked))}
    if shape.layer.has_bias:
        inputs["bias"] = np.stack([c.addends["bias"] for c in cases])
    grouping = shape.grouping(experts.default_knobs(shape, own))
    if grouping is None:
        inputs["experts"] = chosen
    else:
        grouped = run(experts.build_group(grouping), {"experts": chosen}, target, valid=m)
        inputs |= {key: grouped[key] for key in ("tile_expert", "tile_pairs")}
    got = run(experts.build_linear(shape, own), inputs, target, cuts=(1, 2))["y"]
    for expert, case in enumerate(cases):
        layer = replace(shape.layer, m=rows)
        packed = linear.pack(layer, own, linear.Weights(**case.weights))
        alone = run(linear.build(layer, own), {**activations, **packed, **case.addends}, target)
        for pair in np.flatnonzero(chosen.reshape(-1) == expert):
            row = pair if by_pair else pair // top_k
            np.testing.assert_array_equal(got[pair], alone["y"][row])


def test_results_are_added_up_by_weight_and_rows_behind_the_last_token_are_zero(
    target: Target,
) -> None:
    rng = np.random.default_rng(0)
    partial = rng.standard_normal((4 * 3, 37)).astype(np.float32)
    partial[3 * 3 :] = np.nan
    weights = rng.random((4, 3)).astype(np.float32)
    got = run(
        experts.build_combine(4, 3, 37), {"partial": partial, "weights": weights}, target,
        valid=3, cuts=(1,),
    )["y"]  # fmt: skip
    want = np.einsum("tj,tjd->td", weights[:3], partial.reshape(4, 3, 37)[:3].astype(np.float64))
    np.testing.assert_allclose(got[:3], want, atol=1e-6)
    assert not got[3].any()
