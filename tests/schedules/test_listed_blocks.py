"""Kernels whose vectors hold rows, on lists of int8 blocks, compute the bits of the dense ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from slmtvm.schedules import isa as isas
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.linear import LinearShape, Weights, listed_blocks, pack
from slmtvm.schedules.linear.shape import IN_LISTS
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.linear_cases import Case
from tests.schedules.test_blocks import pruned_case, with_turned_rows

SHAPES = [
    LinearShape(70, 19, 77, "int8", "row_u8", has_bias=True, has_residual=True),
    LinearShape(33, 8, 64, "int8", "row_u8"),
    LinearShape(16, 40, 300, "int8", "row_u8", has_residual=True),
    LinearShape(17, 1, 7, "int8", "row_u8", has_bias=True),
]


def in_lists(case: Case, isa: Isa, target: Target) -> Case:
    """The case on lists, its activations turned by their kernel."""
    return with_turned_rows(case, isa, target, window=IN_LISTS, has_zero_points=False)


@pytest.mark.parametrize("target_name", EVERY_TARGET)
def test_lists_of_blocks_compute_the_bits_of_channels_in_lanes(target_name: str) -> None:
    target = Target.load(target_name)
    isa = isas.get(target.isa)
    if isa.listed_blocks is None:
        pytest.skip(f"{target_name} has no such kernel")
    for shape, share, block in zip(
        SHAPES, (0.8, 0.3, 1.0, 0.4), ((1, 4), (1, 1), (8, 4), (1, 4)), strict=True
    ):
        case = pruned_case(shape, isa, share, block)
        given = in_lists(case, isa, target).run(target, isa, cuts=(2,))
        expected = case.run(target, isa)
        np.testing.assert_array_equal(given.view(np.uint32), expected.view(np.uint32))


def test_zero_points_are_taken_off() -> None:
    target = Target.load("x86-64-v3")
    isa = isas.get(target.isa)
    case = pruned_case(
        LinearShape(20, 19, 40, "int8", "row_u8", has_zero_points=True), isa, 0.7, (1, 4)
    )
    zeros = np.clip(case.weights["zero_points"], -27, 28)
    weight = np.where(
        case.weights["weight"] == case.weights["zero_points"].reshape(-1, 1),
        zeros.reshape(-1, 1),
        np.clip(case.weights["weight"], -99, 99),
    ).astype(np.int8)
    weights = case.weights | {"zero_points": zeros, "weight": weight}
    case = dataclasses.replace(case, weights=weights)
    assert listed_blocks.density(case.shape, Weights(**weights)) < 0.5
    given, expected = in_lists(case, isa, target).run(target, isa), case.run(target, isa)
    np.testing.assert_array_equal(given.view(np.uint32), expected.view(np.uint32))


def test_only_blocks_that_hold_a_weight_are_listed() -> None:
    isa = isas.get("avx512_vnni")
    shape = LinearShape(64, 8, 32, "int8", "row_u8", sparse=True, window=IN_LISTS)
    weight = np.zeros((8, 32), np.int8)
    weight[1, 21] = weight[6, 2] = 3
    packed = pack(shape, isa, Weights(weight, np.ones(1, np.float32)))
    assert packed["starts"].tolist() == [0, 0, *[1] * 5, *[2] * 10]
    assert packed["places"].tolist() == [5, 0]
    assert packed["blocks"].tolist() == [[0, 3, 0, 0], [0, 0, 3, 0]]
    assert listed_blocks.density(shape, Weights(weight)) == 2 / 64


def test_a_weight_of_zeros_alone_lists_one_that_no_channel_has() -> None:
    shape = LinearShape(64, 8, 16, "int8", "row_u8", sparse=True, window=IN_LISTS)
    weights = Weights(np.zeros((8, 16), np.int8), np.ones(1, np.float32))
    packed = pack(shape, isas.get("avx2"), weights)
    assert not packed["starts"].any() and packed["places"].shape == (1,)


def test_steps_take_longer_where_few_rows_of_many_inputs_are_near() -> None:
    isa = isas.get("avx2")
    shape = LinearShape(64, 8, 768, "int8", "row_u8")
    more = dataclasses.replace(shape, k=1536)
    near, far = (listed_blocks.relative_time(s, isa, 0.9) for s in (shape, more))
    assert near < 0.9 < far, "of the time of dense kernels"
