"""Kernels of int4 weights with two of every four of k compute the bits of the dense ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.schedules.isa import PAIRS, Isa
from slmtvm.schedules.linear import LinearShape, Weights, pairs, turned_pairs
from slmtvm.schedules.linear.packed_rows import pack_rows, unpack_rows
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.harness import run
from tests.schedules.linear_cases import Case, random_case
from tests.schedules.test_windows import kept_of, name

SHAPES = [
    LinearShape(1, 33, 70, "int4", "block", 32, has_bias=True, scale_dtype="float16"),
    LinearShape(11, 20, 100, "int4", "block", 32, has_bias=True, has_residual=True),
    LinearShape(3, 40, 300, "int4", "block", 128),
    LinearShape(2, 1, 7, "int4", "block", 64),
]


def pruned_case(shape: LinearShape, isa: Isa, *, zero_points: bool = False) -> Case:
    """Extreme weights and activations, with two weights of every four."""
    case = random_case(shape, isa, extreme=True)
    plain = unpack_rows(case.weights["weight"], shape.k, 4).astype(np.int16) - 8
    plain = kept_of(plain.astype(np.int8), PAIRS.kept, PAIRS.size).astype(np.int16)
    weights = {"scales": case.weights["scales"]}
    zeros = np.full((shape.n, shape.groups), 8)
    if zero_points:
        zeros = np.random.default_rng(5).integers(6, 11, zeros.shape)
        plain = np.clip(plain, -6, 5)
        weights["zero_points"] = zeros.astype(np.uint8)
    spread = np.repeat(zeros, shape.group_size, axis=1)[:, : shape.k]
    weights["weight"] = pack_rows((plain + spread).astype(np.uint8), 4)
    given = dataclasses.replace(shape, has_zero_points=zero_points)
    return dataclasses.replace(case, shape=given, weights=weights)


def in_pairs(case: Case) -> Case:
    shape = dataclasses.replace(case.shape, sparse=True, window=PAIRS.name, has_zero_points=False)
    return dataclasses.replace(case, shape=shape)


def assert_same(given: np.ndarray, expected: np.ndarray, message: str = "") -> None:
    np.testing.assert_array_equal(given.view(np.uint32), expected.view(np.uint32), message)


@pytest.mark.parametrize("target_name", EVERY_TARGET)
def test_a_kernel_of_pairs_computes_the_bits_of_the_dense_one(target_name: str) -> None:
    target = Target.load(target_name)
    isa = isas.get(target.isa)
    if isa.pair_times is None:
        with pytest.raises(NotImplementedError):
            isa.pair_picking()
        return
    for shape in SHAPES:
        case = pruned_case(shape, isa)
        assert_same(in_pairs(case).run(target, isa, cuts=(1,)), case.run(target, isa), name(shape))


@pytest.mark.slow
@pytest.mark.parametrize(
    "target_name",
    ["x86-64-v3", "cortex-a78", pytest.param("cortex-a72", marks=pytest.mark.exhaustive)],
)
def test_any_tile_gives_the_same_bits(target_name: str) -> None:
    target = Target.load(target_name)
    isa = isas.get(target.isa)
    case = pruned_case(dataclasses.replace(SHAPES[1], n=70), isa)
    expected = case.run(target, isa)
    for mr, panels, gu, pf in ((3, 1, 2, 0), (8, 2, 1, 1), (2, 4, 4, 2)):
        knobs = {"mr": mr, "nv": panels * isa.for_blocks.vectors, "gu": gu, "pf": pf}
        assert_same(in_pairs(case).run(target, isa, knobs, cuts=(1, 2)), expected)


# Two row blocks, the second not whole, and a part of k left; fewer rows than a vector in groups of
# 64; rows of a kernel that leaves padding out.
TURNED = [
    LinearShape(
        70, 36, 90, "int4", "block", 32, has_bias=True, has_residual=True, scale_dtype="float16"
    ),
    LinearShape(17, 33, 200, "int4", "block", 64, has_bias=True),
    LinearShape(130, 16, 160, "int4", "block", 32),
]


def with_turned_rows(case: Case, isa: Isa, target: Target) -> Case:
    """The case on pairs, its activations as ``turned_pairs`` makes them."""
    case = in_pairs(case)
    shape = dataclasses.replace(case.shape, turned=True)
    given = {name: case.activations[name] for name in ("xq", "xs")}
    made = run(turned_pairs.turning(shape, isa), given, target, cuts=(1,))
    turned = {name: made[name] for name in ("xp", "xr")}
    return dataclasses.replace(case, shape=shape, activations=turned)


@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=[pytest.mark.slow] * (s.m > 17)) for s in TURNED], ids=name
)
def test_turned_rows_give_the_bits_of_the_dense_kernel(shape: LinearShape) -> None:
    target = Target.load("x86-64-v3")
    isa = isas.get(target.isa)
    case = pruned_case(shape, isa)
    turned = with_turned_rows(case, isa, target)
    assert_same(turned.run(target, isa, cuts=(1,)), case.run(target, isa))


@pytest.mark.slow
def test_turned_rows_that_are_padding_are_left_out() -> None:
    target = Target.load("x86-64-v3")
    isa = isas.get(target.isa)
    case = with_turned_rows(pruned_case(TURNED[2], isa), isa, target)
    padded = dataclasses.replace(case, shape=dataclasses.replace(case.shape, padded=True))
    full, given = case.run(target, isa), padded.run(target, isa, valid=60)
    assert_same(given[:60], full[:60])
    assert (given[64:] == 0).all() and given.shape == full.shape


@pytest.mark.slow
def test_places_that_no_weight_has_count_as_the_first_two() -> None:
    target = Target.load("x86-64-v3")
    isa = isas.get(target.isa)
    case = with_turned_rows(pruned_case(TURNED[1], isa), isa, target)
    kernel = linear.build(case.shape, isa)
    packed = linear.pack(case.shape, isa, Weights(**case.weights))
    found = []
    # The first two k's in all steps; one k twice, of two kinds.
    for first, second in ((0b00000000, 0b01010101), (0b10101010, 0b10101010), (0xFF, 0xFF)):
        weight = packed["weight"].copy()
        parts = weight.reshape(-1, pairs.PARTS, pairs.part_bytes(isa))
        parts[:, -1, ::2], parts[:, -1, 1::2] = first, second
        given = {**case.activations, **packed, "weight": weight, **case.addends}
        found.append(run(kernel, given, target)["y"])
    for given in found[1:]:
        assert_same(given, found[0])


@pytest.mark.slow
def test_zero_points_are_taken_off() -> None:
    target = Target.load("x86-64-v3")
    isa = isas.get(target.isa)
    case = pruned_case(SHAPES[1], isa, zero_points=True)
    assert pairs.fits(case.shape, Weights(**case.weights))
    assert_same(in_pairs(case).run(target, isa), case.run(target, isa))


def test_one_weight_too_many_breaks_a_pair() -> None:
    shape = LinearShape(1, 40, 70, "int4", "block", 32)
    plain = kept_of(np.ones((40, 70), np.int8), 2, 4)

    def fits(values: np.ndarray, zero: float = 8, dtype: type = np.uint8) -> bool:
        zeros = np.full((40, 3), zero, dtype)
        return pairs.fits(shape, Weights(pack_rows(values.astype(np.uint8), 4), None, zeros))

    assert fits(plain + 8)
    assert fits(plain, 0), "values of 0 and 1"
    assert not fits(plain * 15, 0), "15 is not int4 with a sign"
    assert not fits(plain + 8, 8, np.float32), "a float is not taken off"
    plain[17, 64:67] = 1
    assert not fits(plain + 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "int8"},
        {"window": "4of8"},
        {"window": ""},
        {"has_zero_points": True},
        {"group_size": 16},
        {"turned": True, "group_size": 128},
    ],
)
def test_other_formats_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(isas.TargetError):
        dataclasses.replace(SHAPES[0], **{"sparse": True, "window": PAIRS.name, **changes})
