"""Sparse linear kernels compute the bits of the dense ones on the same weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.linear import LinearShape, blocks, turned_rows
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.harness import run
from tests.schedules.linear_cases import Case, random_case

SHAPES = [
    LinearShape(1, 33, 70, "int8", "row_u8", has_bias=True),
    LinearShape(1, 61, 100, "int8", "row_u8", has_zero_points=True, has_residual=True),
    LinearShape(5, 48, 100, "int8", "row_u8", has_bias=True, has_residual=True),
    LinearShape(11, 20, 70, "int8", "row_u8", has_zero_points=True),
    LinearShape(17, 7, 33, "int8", "row_u8", has_residual=True),
    LinearShape(2, 1, 7, "int8", "row_u8", has_zero_points=True),
]


@pytest.fixture(params=EVERY_TARGET)
def target(request: pytest.FixtureRequest) -> Target:
    return Target.load(request.param)


@pytest.fixture
def isa(target: Target) -> Isa:
    return isas.get(target.isa)


def name(shape: LinearShape) -> str:
    return shape.kernel_name("", {}).removeprefix("linear_")


def pruned_case(
    shape: LinearShape, isa: Isa, share: float, block: tuple[int, int] = (8, 4)
) -> Case:
    """A random case; ``share`` of the weight's blocks are at the zero point."""
    case = random_case(shape, isa, extreme=True)
    rng = np.random.default_rng(1)
    rows, columns = block
    zero = rng.random((-(-shape.n // rows), -(-shape.k // columns))) < share
    zero = np.repeat(np.repeat(zero, rows, axis=0), columns, axis=1)[: shape.n, : shape.k]
    weights = case.weights
    at_zero = weights.get("zero_points", np.zeros(shape.n, np.int8)).reshape(-1, 1)
    scales = np.random.default_rng(2).uniform(0.001, 0.03, shape.n).astype(np.float32)
    weights = weights | {"weight": np.where(zero, at_zero, weights["weight"]), "scales": scales}
    return dataclasses.replace(case, weights=weights)


def sparse(case: Case, **changes: object) -> Case:
    return dataclasses.replace(case, shape=dataclasses.replace(case.shape, sparse=True, **changes))


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_a_sparse_kernel_computes_the_bits_of_the_dense_one(
    shape: LinearShape, target: Target, isa: Isa
) -> None:
    case = pruned_case(shape, isa, share=1.0 if shape.n == 7 else 0.7)
    expected = case.run(target, isa)
    given = sparse(case).run(target, isa, cuts=(1,))
    np.testing.assert_array_equal(given.view(np.uint32), expected.view(np.uint32))


def with_turned_rows(case: Case, isa: Isa, target: Target, **changes: object) -> Case:
    """The case on sparse weights, its activations turned by their kernel."""
    shape = dataclasses.replace(case.shape, sparse=True, **changes)
    xq, *beside = case.activations.items()
    turned = run(turned_rows.turning(shape, isa), dict([xq]), target, cuts=(1,))
    given = {"xt": turned["xt"], **dict(beside)}
    return dataclasses.replace(case, shape=shape, activations=given)


# Three blocks of rows, the last not whole; one, with zero points; k of which few rows are near.
SLOW = pytest.mark.slow
TURNED = [
    (LinearShape(70, 19, 77, "int8", "row_u8", has_bias=True, has_residual=True), 0.7),
    (LinearShape(17, 33, 70, "int8", "row_u8", has_zero_points=True), 0.5),
    (LinearShape(27, 8, 3000, "int8", "row_u8", has_bias=True), 0.9),
]


@pytest.mark.slow
@pytest.mark.parametrize("target_name", [pytest.param("cortex-a72", marks=SLOW), "cortex-a78"])
def test_blocks_that_meet_turned_rows_compute_the_bits_of_the_dense_kernel(
    target_name: str,
) -> None:
    target = Target.load(target_name)
    isa = isas.get(target.isa)
    for shape, share in TURNED:
        case = pruned_case(shape, isa, share)
        expected = case.run(target, isa)
        given = with_turned_rows(case, isa, target, turned=True).run(target, isa, cuts=(1,))
        np.testing.assert_array_equal(given.view(np.uint32), expected.view(np.uint32), str(shape))


@pytest.mark.slow
@pytest.mark.parametrize("target_name", ["cortex-a72", "cortex-a78"])
def test_any_tile_of_turned_rows_gives_the_same_bits(target_name: str) -> None:
    target = Target.load(target_name)
    isa = isas.get(target.isa)
    shape = TURNED[0][0]
    case = pruned_case(shape, isa, 0.3)
    expected = case.run(target, isa)
    turned = with_turned_rows(case, isa, target, turned=True)
    space = linear.knob_space(turned.shape, isa)
    assert all(32 % mr == 0 for mr in space["mr"])
    for knobs in ({"mr": space["mr"][0], "ku": 1}, {"mr": space["mr"][-1], "ku": 4}):
        given = turned.run(target, isa, {"nv": 2, "pf": 0, **knobs}, cuts=(2,))
        np.testing.assert_array_equal(given.view(np.uint32), expected.view(np.uint32), str(knobs))
    padded = dataclasses.replace(turned, shape=dataclasses.replace(turned.shape, padded=True))
    given = padded.run(target, isa, valid=33)
    np.testing.assert_array_equal(given[:33].view(np.uint32), expected[:33].view(np.uint32))
    assert (given[40:] == 0).all(), "tiles of padding alone"


def test_tiles_of_turned_rows_lie_in_one_block_of_rows() -> None:
    for m, k in ((16, 64), (70, 64), (128, 2304), (128, 3072), (300, 30000)):
        shape = LinearShape(m, 64, k, "int8", "row_u8", sparse=True, turned=True)
        for isa in (isas.get("neon"), isas.get("neon_dotprod")):
            rows = turned_rows.lane_rows(m, shape.padded_k, isa)
            mr = linear.default_knobs(shape, isa)["mr"]
            # Of a setting that was measured with other numbers of rows, what fits is taken.
            near = linear.effective_knobs(shape, isa, {"mr": 12, "nv": 2, "ku": 2, "pf": 0})["mr"]
            for size in (mr, near):
                assert size % isa.lanes == 0 and (rows >= m or rows % size == 0), (m, k, isa.name)


def test_only_blocks_of_bytes_meet_turned_rows() -> None:
    with pytest.raises(isas.TargetError, match="turned activations of blocks"):
        LinearShape(16, 16, 64, "int8", "row_u8", turned=True)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=name)
@pytest.mark.parametrize("share", [0.0, 0.95])
def test_any_tile_gives_the_same_bits(
    shape: LinearShape, share: float, target: Target, isa: Isa
) -> None:
    case = sparse(pruned_case(shape, isa, share, block=(1, 5)))
    expected = dataclasses.replace(case, shape=dataclasses.replace(case.shape, sparse=False)).run(
        target, isa
    )
    for knobs in ({"mr": 3, "nv": 2, "ku": 1, "pf": 0}, {"mr": 8, "nv": 2, "ku": 8, "pf": 2}):
        if isa.panel == 32:
            knobs |= {"nv": 1}
        given = case.run(target, isa, knobs, cuts=(1, 2))
        np.testing.assert_array_equal(given.view(np.uint32), expected.view(np.uint32), str(knobs))


def test_zero_points_are_taken_off_where_int8_holds_the_difference() -> None:
    target = Target.load("x86-64-v3")
    isa = isas.get(target.isa)
    shape = LinearShape(5, 20, 70, "int8", "row_u8", has_zero_points=True)
    case = pruned_case(shape, isa, 0.5)
    zeros = np.clip(case.weights["zero_points"], -27, 28)
    weights = case.weights | {
        "zero_points": zeros,
        "weight": np.clip(case.weights["weight"], -100, 100).astype(np.int8),
    }
    case = dataclasses.replace(case, weights=weights)
    assert blocks.centred(linear.Weights(**weights)) is not None
    plain = sparse(case, has_zero_points=False)
    np.testing.assert_array_equal(plain.run(target, isa), case.run(target, isa))
    weights["weight"][0, 0], weights["zero_points"][0] = -128, 1
    assert blocks.centred(linear.Weights(**weights)) is None


@pytest.mark.parametrize("changes", [{}, {"turned": True}, {"window": "4of16"}], ids=str)
def test_settings_to_try_are_those_that_make_the_code(changes: dict[str, object]) -> None:
    isa = isas.get("neon_dotprod")
    shape = dataclasses.replace(LinearShape(20, 64, 64, "int8", "row_u8", sparse=True), **changes)
    first, *others = TEMPLATES["linear"].settings(shape, isa)
    assert first == linear.default_knobs(shape, isa) and first not in others
    space = linear.knob_space(shape, isa)
    assert {knobs["ku"] for knobs in (first, *others)} == {*space["ku"]}


def test_only_blocks_that_hold_a_weight_are_stored() -> None:
    isa = isas.get("avx2")
    shape = LinearShape(1, 32, 64, "int8", "row_u8", sparse=True)
    weight = np.zeros((32, 64), np.int8)
    weight[9, 21] = weight[30, 2] = 1
    weights = linear.Weights(weight, np.ones(1, np.float32))
    packed = linear.pack(shape, isa, weights)
    assert packed["starts"].tolist() == [0, 0, 1, 1, 2]
    assert packed["places"].tolist() == [20, 0]
    assert packed["blocks"].shape == (2, 8, 4)
    assert (packed["blocks"][0, 1].tolist(), packed["blocks"][1, 6].tolist()) == (
        [0, 1, 0, 0],
        [0, 0, 1, 0],
    )
    assert blocks.density(shape, isa, weights) == 2 / 64


def test_x86_and_arm_share_their_blocks() -> None:
    shape = LinearShape(1, 32, 64, "int8", "row_u8", sparse=True)
    weights = linear.Weights(np.eye(32, 64, dtype=np.int8), np.ones(1, np.float32))
    packed = [
        {part: a.tobytes() for part, a in linear.pack(shape, isas.get(isa), weights).items()}
        for isa in ("avx2", "avx512_vnni", "neon", "neon_dotprod")
    ]
    assert all(p == packed[0] for p in packed)
    assert (
        len({linear.layout(shape, isas.get(isa)) for isa in ("avx2", "avx512_vnni", "neon")}) == 1
    )


@pytest.mark.parametrize(("format", "activation"), [("int8", "f32"), ("f16", "f32")])
def test_other_formats_are_refused(format: str, activation: str) -> None:
    with pytest.raises(isas.TargetError, match="supported are sparse weights"):
        LinearShape(1, 16, 64, format, activation, sparse=True)
