"""Kernels whose vectors hold rows, on lists of weights, compute the bits of the dense ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from slmtvm.schedules import isa as isas
from slmtvm.schedules.linear import LinearShape, Weights, pack, rows_in_lanes
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.harness import run
from tests.schedules.linear_cases import Case, random_case

SHAPES = [
    LinearShape(70, 19, 77, "f32", has_bias=True, has_residual=True),
    LinearShape(33, 8, 64, "f32"),
    LinearShape(16, 5, 3, "f32", has_bias=True),
]


def with_zeros(case: Case, share: float) -> Case:
    weight = case.weights["weight"].copy()
    weight[np.random.default_rng(1).random(weight.shape) < share] = 0
    weight[3] = 0  # a channel without any
    return dataclasses.replace(case, weights={"weight": weight})


@pytest.mark.slow
@pytest.mark.parametrize("target_name", EVERY_TARGET)
def test_rows_in_lanes_compute_the_bits_of_channels_in_lanes(target_name: str) -> None:
    target = Target.load(target_name)
    isa = isas.get(target.isa)
    if isa.listed_rows is None:
        pytest.skip(f"{target_name} has no such kernel")
    for shape, share in zip(SHAPES, (0.8, 0.3, 0.5), strict=True):
        case = with_zeros(random_case(shape, isa), share)
        x = case.activations["x"]
        turned = run(rows_in_lanes.turning(shape.m, shape.k, isa), {"x": x}, target, cuts=(1,))
        xt = turned["xt"]
        rows = xt[:, : shape.k].transpose(0, 2, 1).reshape(-1, shape.k)
        np.testing.assert_array_equal(rows[: shape.m], x)
        assert not rows[shape.m :].any()
        sparse = dataclasses.replace(
            case, shape=dataclasses.replace(shape, sparse=True), activations={"xt": xt}
        )
        given, expected = sparse.run(target, isa, cuts=(2,)), case.run(target, isa)
        np.testing.assert_array_equal(given.view(np.uint32), expected.view(np.uint32))


def test_sums_that_underflow_have_the_sign_of_the_dense_ones() -> None:
    target = Target.load("x86-64-v3")
    isa = isas.get(target.isa)
    shape = LinearShape(16, 9, 21, "f32")
    case = with_zeros(random_case(shape, isa), 0.8)
    x = np.full((16, 21), 1e-30, np.float32) * np.sign(case.activations["x"])
    weight = case.weights["weight"] * np.float32(1e-20)
    case = dataclasses.replace(case, activations={"x": x}, weights={"weight": weight})
    xt = run(rows_in_lanes.turning(16, 21, isa), {"x": x}, target)
    sparse = dataclasses.replace(
        case, shape=dataclasses.replace(shape, sparse=True), activations=xt
    )
    given, expected = sparse.run(target, isa), case.run(target, isa)
    assert not expected.any()
    np.testing.assert_array_equal(given.view(np.uint32), expected.view(np.uint32))


OTHERS = ("x86-64-v4-vnni", "cortex-a72", "cortex-a78")


@pytest.mark.parametrize(
    ("bad", "target_name"),
    [
        *((bad, "x86-64-v3") for bad in (np.inf, -np.inf, np.nan)),
        *(pytest.param(np.inf, name, marks=pytest.mark.slow) for name in OTHERS),
    ],
)
def test_what_is_not_finite_meets_the_zeros_too(bad: float, target_name: str) -> None:
    target = Target.load(target_name)
    isa = isas.get(target.isa)
    # Places of k in the whole parts that are turned and in the rest, and rows of both row blocks.
    shape = LinearShape(70, 19, 77, "f32", has_bias=True)
    case = with_zeros(random_case(shape, isa), 0.8)
    x = case.activations["x"].copy()
    x[[3, 40, 40, 69], [5, 20, 76, 76]] = bad
    case = dataclasses.replace(case, activations={"x": x})
    turned = run(rows_in_lanes.turning(shape.m, shape.k, isa), {"x": x}, target, cuts=(1,))
    sparse = dataclasses.replace(
        case, shape=dataclasses.replace(shape, sparse=True), activations=turned
    )
    given, expected = sparse.run(target, isa), case.run(target, isa)
    numbers = ~np.isnan(expected)
    assert (~numbers).any() and (bad != bad or np.isinf(expected).any())
    assert not (~numbers)[[0, 39, 41]].any()
    np.testing.assert_array_equal(np.isnan(given), ~numbers)
    np.testing.assert_array_equal(given[numbers].view("u4"), expected[numbers].view("u4"))


def test_a_weight_of_zeros_alone_lists_one_that_no_channel_has() -> None:
    shape = LinearShape(64, 8, 16, "f32", sparse=True)
    packed = pack(shape, isas.get("avx2"), Weights(np.zeros((8, 16), np.float32)))
    assert not packed["starts"].any() and packed["places"].shape == (1,)


def test_other_floats_are_refused() -> None:
    with pytest.raises(isas.TargetError, match="of float32"):
        LinearShape(64, 8, 16, "f16", sparse=True)
