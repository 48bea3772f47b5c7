"""Kernels whose vectors hold rows, on lists of single int8 weights, compute the bits of the dense
ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.linear import LinearShape, Weights, listed_weights, pack, turned_bytes
from slmtvm.schedules.linear.shape import FREE
from slmtvm.target import Target
from slmtvm.tuning.inputs import fills_of
from tests.machines import runnable_targets
from tests.schedules.harness import run
from tests.schedules.linear_cases import Case
from tests.schedules.test_blocks import pruned_case

SHAPES = [  # two blocks of rows, of which one is not whole; one vector; rows that fill vectors
    (LinearShape(70, 19, 77, "int8", "row_u8", has_bias=True, has_residual=True), 0.8),
    (LinearShape(16, 40, 300, "int8", "row_u8", has_residual=True), 0.5),
    (LinearShape(128, 8, 64, "int8", "row_u8"), 1.0),
]


def in_lists(case: Case, isa: Isa, target: Target) -> Case:
    """The case on lists, its activations turned by their kernel."""
    shape = dataclasses.replace(case.shape, sparse=True, window=FREE, has_zero_points=False)
    xq, *beside = case.activations.items()
    turned = run(turned_bytes.turning(shape, isa), dict([xq]), target, cuts=(1,))
    given = {"xt": turned["xt"], **dict(beside)}
    return dataclasses.replace(case, shape=shape, activations=given)


TARGETS = [
    target.name for target in runnable_targets() if isas.get(target.isa).listed_weights is not None
]


@pytest.mark.parametrize("target_name", TARGETS)
def test_lists_of_weights_compute_the_bits_of_channels_in_lanes(target_name: str) -> None:
    target = Target.load(target_name)
    isa = isas.get(target.isa)
    for shape, share in SHAPES:
        case = pruned_case(shape, isa, share, (1, 1))
        given = in_lists(case, isa, target).run(target, isa, cuts=(2,))
        expected = case.run(target, isa)
        np.testing.assert_array_equal(given.view(np.uint32), expected.view(np.uint32), str(shape))


@pytest.mark.parametrize("target_name", TARGETS)
def test_sums_of_as_many_groups_as_there_may_be_are_exact(target_name: str) -> None:
    target = Target.load(target_name)
    isa = isas.get(target.isa)
    shape = LinearShape(17, 8, 1040, "int8", "row_u8")
    case = pruned_case(shape, isa, 0.0, (1, 1))
    weight = np.zeros((shape.n, shape.k), np.int8)
    weight[:, : 4 * listed_weights.MOST_TERMS] = 32  # 128 in all, as much as fits
    weight[::2] *= -1
    xq = np.full_like(case.activations["xq"], 255)
    xq[3:] = np.arange(xq[3:].size).reshape(xq[3:].shape) % 256
    case = dataclasses.replace(
        case,
        weights={**case.weights, "weight": weight},
        activations={**case.activations, "xq": xq},
    )
    shape = dataclasses.replace(shape, sparse=True, window=FREE)
    packed = pack(shape, isa, Weights(**case.weights))
    assert (np.diff(packed["starts"])[: shape.n] == listed_weights.MOST_TERMS).all()
    assert (packed["halved"] == packed["starts"][1:]).all(), "all groups are whole"
    given, expected = in_lists(case, isa, target).run(target, isa), case.run(target, isa)
    np.testing.assert_array_equal(given.view(np.uint32), expected.view(np.uint32))


def test_zero_points_are_taken_off_and_only_what_is_left_is_listed() -> None:
    isa = isas.get("avx2")
    shape = LinearShape(64, 8, 32, "int8", "row_u8", sparse=True, window=FREE)
    weight = np.full((8, 32), 3, np.int8)
    weight[1, 21], weight[6, 2], weight[6, 30] = 5, -4, 13
    packed = pack(shape, isa, Weights(weight, np.ones(1, np.float32), np.full(1, 3, np.int8)))
    assert packed["starts"].tolist() == [0, 0, *[1] * 5, *[2] * 10]
    assert packed["halved"].tolist() == packed["starts"][:-1].tolist()
    assert packed["places"].tolist() == [
        [21 * listed_weights.PLACE, 0, 0, 0],
        [30 * listed_weights.PLACE, 2 * listed_weights.PLACE, 0, 0],
    ]
    assert packed["values"].tolist() == [[2, 0, 0, 0], [10, -7, 0, 0]]


def test_a_weight_of_zeros_alone_lists_one_group_that_no_channel_has() -> None:
    shape = LinearShape(64, 8, 16, "int8", "row_u8", sparse=True, window=FREE)
    weights = Weights(np.zeros((8, 16), np.int8), np.ones(1, np.float32))
    packed = pack(shape, isas.get("avx2"), weights)
    assert not packed["starts"].any() and packed["places"].shape == (1, 4)
    assert listed_weights.density(shape, weights) == 0


def test_channels_of_too_many_groups_have_no_density() -> None:
    def density(used: int, k: int, value: int) -> float | None:
        weight = np.zeros((2, k), np.int8)
        weight[:, :used] = value
        return listed_weights.density(LinearShape(64, 2, k, "int8", "row_u8"), Weights(weight))

    assert density(1020, 2048, 32) == 1020 / 2048
    assert density(1021, 2048, 32) is None
    assert density(254, 1024, 127) == 1.25 * 127 * 4 / 1024, "two of a halved group each"
    assert density(255, 1024, 127) is None
    assert density(16, listed_weights.MAX_K + 16, 1) is None
    assert density(13, 16, 1) is None, "hardly any zeros"


def test_measured_lists_have_places_within_a_row_block() -> None:
    shape = LinearShape(40, 24, 100, "int8", "row_u8", sparse=True, window=FREE)
    kernel = linear.build(shape, isas.get("avx2"))
    fills = dict(zip((t.name for t in kernel.tensors), fills_of(kernel), strict=True))
    groups, places = fills["starts"].low, fills["places"]
    assert fills["halved"] == dataclasses.replace(fills["starts"], size=fills["halved"].size)
    assert places.high == 4 * groups and fills["values"].size * 2 == places.size
    last = places.low * (places.high - 1)
    assert last % listed_weights.PLACE == 0 and 0 < last / listed_weights.PLACE < shape.k


def test_rows_that_fill_no_vector_take_the_time_of_those_that_do() -> None:
    isa = isas.get("avx2")

    def time(m: int) -> float:
        shape = LinearShape(m, 64, 384, "int8", "row_u8")
        return round(m * listed_weights.relative_time(shape, isa, 0.25), 6)

    assert time(16) == time(32) < time(33) == time(64) < time(65) < time(128) == 2 * time(64)
