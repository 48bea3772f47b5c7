"""Kernels on columns of 16 channels compute the bits of the dense ones on the same weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.linear import LinearShape, Weights, columns
from slmtvm.schedules.linear.shape import COLUMNS
from slmtvm.target import Target
from tests.schedules.harness import run
from tests.schedules.linear_cases import Case
from tests.schedules.test_blocks import name, pruned_case

RVV = Target.load("riscv64-rvv")
ISA = isas.get(RVV.isa)
# k of one piece and less, of pieces of all sizes, of many steps; lists that end in half a step.
FEW = [
    (LinearShape(1, 33, 70, "int8", "row_u8", has_bias=True), 0.5),
    (LinearShape(1, 20, 9, "int8", "row_u8"), 0.3),
    (LinearShape(2, 64, 305, "int8", "row_u8", has_bias=True, has_residual=True), 0.0),
    (LinearShape(17, 7, 33, "int8", "row_u8", has_residual=True), 1.0),
]
MANY = [
    (LinearShape(70, 19, 77, "int8", "row_u8", has_bias=True, has_residual=True), 0.5),
    (LinearShape(32, 48, 176, "int8", "row_u8"), 0.2),
    (LinearShape(33, 40, 16, "int8", "row_u8"), 0.9),
]


def by_columns(case: Case) -> Case:
    """The case on columns, its rows turned by their kernel where they are many."""
    shape = dataclasses.replace(
        case.shape,
        sparse=True,
        window=COLUMNS,
        turned=columns.turns(case.shape.m, ISA),
        has_zero_points=False,
    )
    activations = dict(case.activations)
    if shape.turned:
        xq = activations.pop("xq")
        xt = run(columns.turning(shape, ISA), {"xq": xq}, RVV, cuts=(1,))["xt"]
        rows = xt.transpose(0, 2, 1).reshape(-1, shape.padded_k)
        np.testing.assert_array_equal(rows[: shape.m], xq)
        assert not rows[shape.m :].any()
        activations = {"xt": xt, **activations}
    return dataclasses.replace(case, shape=shape, activations=activations)


def assert_same(given: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(given.view(np.uint32), expected.view(np.uint32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "share"), [*FEW, *MANY], ids=lambda v: name(v) if isinstance(v, LinearShape) else ""
)
def test_columns_compute_the_bits_of_the_dense_kernel(shape: LinearShape, share: float) -> None:
    case = pruned_case(shape, ISA, share, (16, 1))
    assert_same(by_columns(case).run(RVV, ISA, cuts=(1,)), case.run(RVV, ISA))


@pytest.mark.slow
def test_zeros_anywhere_and_padding_change_nothing() -> None:
    case = pruned_case(MANY[0][0], ISA, 0.9, (3, 2))
    made = by_columns(case)
    expected = case.run(RVV, ISA)
    assert_same(made.run(RVV, ISA), expected)
    padded = dataclasses.replace(made, shape=dataclasses.replace(made.shape, padded=True))
    given = padded.run(RVV, ISA, valid=31)
    assert_same(given[:31], expected[:31])
    assert (given[32:] == 0).all(), "tiles of padding alone"


@pytest.mark.slow
def test_zero_points_are_taken_off() -> None:
    shape = LinearShape(1, 20, 70, "int8", "row_u8", has_zero_points=True)
    case = pruned_case(shape, ISA, 0.5, (16, 1))
    zeros = np.clip(case.weights["zero_points"], -27, 28)
    at_zero = case.weights["weight"] == case.weights["zero_points"].reshape(-1, 1)
    weight = np.where(at_zero, zeros.reshape(-1, 1), np.clip(case.weights["weight"], -99, 99))
    weights = case.weights | {"zero_points": zeros, "weight": weight.astype(np.int8)}
    case = dataclasses.replace(case, weights=weights)
    assert columns.fits(shape, Weights(**weights))
    assert columns.density(shape, Weights(**weights)) < 0.7
    assert_same(by_columns(case).run(RVV, ISA), case.run(RVV, ISA))
    weights["weight"][0, 0], weights["zero_points"][0] = -128, 1
    assert not columns.fits(shape, Weights(**weights))


def packed(weight: np.ndarray, isa: Isa = ISA) -> dict[str, np.ndarray]:
    shape = LinearShape(1, *weight.shape, "int8", "row_u8", sparse=True, window=COLUMNS)
    return linear.pack(shape, isa, Weights(weight, np.ones(1, np.float32)))


def test_only_columns_that_hold_a_weight_are_stored() -> None:
    weight = np.zeros((40, 100), np.int8)
    weight[3, 2], weight[15, 98], weight[17] = 5, 7, np.arange(100)
    found = packed(weight)
    assert found["starts"].tolist() == [0, 1, 5, 5, 5], "in halves of steps"
    assert found["masks"][0].tolist() == [4, 0, 0, 0, 0, 0, 4]
    assert found["fills"][:2].tolist() == [[0, 1, 1], [0, 63, 95]], "pieces of 64, 32 and 16"
    stored = found["columns"].reshape(5, -1)
    assert stored[0].reshape(16, 32)[[3, 15], :2].tolist() == [[5, 0], [0, 7]]
    first_step = stored[1:].reshape(4, -1)[0].reshape(-1)[: 4 * 64].reshape(4, 64)
    assert first_step[1].tolist() == [*range(1, 65)]
    assert columns.density(LinearShape(1, 40, 100, "int8", "row_u8"), Weights(weight)) == (
        pytest.approx(101 / 300)
    )


def test_a_weight_of_zeros_alone_stores_a_step_that_no_list_has() -> None:
    found = packed(np.zeros((16, 16), np.int8))
    assert not found["starts"].any() and found["columns"].shape == (1, 16, 32)


def test_other_formats_and_zero_points_are_refused() -> None:
    with pytest.raises(isas.TargetError, match="columns of sparse weights"):
        LinearShape(1, 16, 64, "int8", "row_u8", window=COLUMNS)
    with pytest.raises(isas.TargetError, match="without zero points"):
        LinearShape(1, 16, 64, "int8", "row_u8", sparse=True, window=COLUMNS, has_zero_points=True)
    with pytest.raises(NotImplementedError, match="takes no columns"):
        isas.get("avx2").compacting()
