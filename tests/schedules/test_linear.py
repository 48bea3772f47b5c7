"""Linear kernels compute what their references say, on every target and at awkward sizes."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.linear import LinearShape
from slmtvm.schedules.linear.shape import FLOAT8
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.linear_cases import FLOATS, Case, random_case

# Rounding: one float32 operation for each k or group, each wrong by 2**-24 of the terms' magnitude.
RELATIVE = 1e-6

BLOCK16 = {"activation": "block", "scale_dtype": "float16"}
FLOAT_ZERO_POINTS = {"has_zero_points": True, "float_zero_points": True}
SHAPES = [
    LinearShape(1, 33, 70, "f32", has_bias=True),
    LinearShape(5, 7, 33, "f32", has_residual=True),
    LinearShape(5, 33, 37, "f16"),
    LinearShape(5, 48, 70, "int4", group_size=32, has_residual=True, **BLOCK16),
    LinearShape(1, 7, 100, "int4", "block", 32, has_zero_points=True, has_bias=True),
    LinearShape(2, 33, 300, "int4", group_size=128, **BLOCK16),
    LinearShape(17, 16, 33, "int4", group_size=16, has_zero_points=True, **BLOCK16),
    LinearShape(47, 33, 70, "int4", group_size=32, **BLOCK16),
    LinearShape(2, 33, 70, "int8", group_size=32, **BLOCK16),
    LinearShape(17, 1, 300, "int8", "block", 256, has_zero_points=True),
    LinearShape(5, 33, 70, "int8", "row_u8", has_bias=True, has_residual=True),
    LinearShape(17, 48, 100, "int8", "row_u8", has_zero_points=True),
    LinearShape(5, 33, 37, "bf16", has_bias=True),
    LinearShape(5, 48, 70, "int4", group_size=32, has_residual=True, scale_dtype="float16"),
    LinearShape(1, 33, 70, "int4", group_size=16, has_zero_points=True, has_bias=True),
    LinearShape(2, 33, 300, "int8", group_size=128, has_zero_points=True),
    LinearShape(5, 7, 61, "int8", has_bias=True),
    LinearShape(3, 33, 100, "int4", group_size=32, **FLOAT_ZERO_POINTS),
    LinearShape(3, 33, 100, "int4", "block", 32, **FLOAT_ZERO_POINTS),
    LinearShape(2, 33, 100, "int8", "block", 64, **FLOAT_ZERO_POINTS),
    LinearShape(2, 20, 61, "e4m3fn"),
    LinearShape(1, 70, 61, "int4", group_channels=32, has_zero_points=True, has_bias=True),
    LinearShape(5, 33, 70, "int4", group_channels=16, has_residual=True),
    LinearShape(3, 45, 37, "int8", group_channels=8, has_zero_points=True),
    LinearShape(2, 37, 21, "int4", group_channels=4, has_zero_points=True),
    LinearShape(3, 33, 70, "int4", group_size=8, has_zero_points=True),
    LinearShape(3, 33, 45, "int8", group_size=8),
    LinearShape(3, 33, 61, "int16", has_zero_points=True, has_bias=True),
    LinearShape(2, 7, 70, "int16", group_size=32, scale_dtype="float16"),
    LinearShape(1, 33, 300, "int2", "block", 32, has_bias=True),
    LinearShape(
        5, 33, 100, "int2", group_size=16, has_zero_points=True, has_residual=True, **BLOCK16
    ),
    LinearShape(3, 33, 70, "int2", group_size=32),
    LinearShape(2, 7, 61, "int2", group_size=16, **FLOAT_ZERO_POINTS),
    # Blocks of any length, those that end within a load of weights too.
    LinearShape(3, 33, 70, "int4", group_size=20, has_zero_points=True),
    LinearShape(1, 20, 61, "int4", group_size=5, scale_dtype="float16", **FLOAT_ZERO_POINTS),
    LinearShape(2, 33, 45, "int8", group_size=6, has_zero_points=True, has_bias=True),
    LinearShape(3, 7, 70, "int2", group_size=24, has_zero_points=True),
    LinearShape(2, 33, 61, "int16", group_size=5, has_zero_points=True),
    LinearShape(2, 20, 61, "e4m3fn", group_size=12),
    LinearShape(3, 45, 37, "int16", group_channels=16, has_zero_points=True, has_bias=True),
    LinearShape(2, 37, 45, "int2", group_channels=8, has_zero_points=True),
    LinearShape(2, 70, 61, "e5m2", group_channels=32),
]
QUANTIZED = [
    LinearShape(5, 33, 96, "int4", "block", 32),
    LinearShape(5, 33, 128, "int4", "block", 128, has_zero_points=True),
    LinearShape(5, 33, 256, "int2", "block", 256, has_zero_points=True),
    LinearShape(1, 33, 256, "int2", "block", 64),
    LinearShape(5, 33, 96, "int8", "block", 32),
    LinearShape(5, 33, 256, "int8", "block", 256, has_zero_points=True),
    LinearShape(5, 33, 112, "int8", "row_u8"),
    LinearShape(5, 33, 112, "int8", "row_u8", has_zero_points=True),
]


@pytest.fixture(params=EVERY_TARGET)
def target(request: pytest.FixtureRequest) -> Target:
    return Target.load(request.param)


@pytest.fixture
def isa(target: Target) -> Isa:
    return isas.get(target.isa)


def same_shape(shape: LinearShape, **changes: object) -> LinearShape:
    return LinearShape(**{**shape.__dict__, **changes})  # type: ignore[arg-type]


def name(shape: LinearShape) -> str:
    return shape.kernel_name("", {}).removeprefix("linear_")


def check(case: Case, y: np.ndarray) -> None:
    error = np.abs(y - case.reference())
    assert (error <= RELATIVE * case.magnitude()).all(), error.max()


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_a_kernel_matches_its_reference(shape: LinearShape, target: Target, isa: Isa) -> None:
    case = random_case(shape, isa)
    check(case, case.run(target, isa, cuts=(1, 2)))


@pytest.mark.parametrize("shape", QUANTIZED, ids=name)
def test_extreme_values_are_summed_exactly(shape: LinearShape, target: Target, isa: Isa) -> None:
    case = random_case(shape, isa, extreme=True)
    np.testing.assert_array_equal(case.run(target, isa), case.reference())


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_the_reference_multiplies_dequantized_operands(shape: LinearShape) -> None:
    case = random_case(shape, isas.get("avx2"))
    x, w = case.operands()
    expected = x @ w.T
    for addend in case.addends.values():
        expected = expected + addend
    np.testing.assert_allclose(case.reference(), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        LinearShape(17, 40, 70, "f32", has_bias=True),
        LinearShape(17, 40, 300, "int4", group_size=32, has_bias=True, **BLOCK16),
        LinearShape(17, 40, 300, "int8", "block", 64, has_zero_points=True, has_residual=True),
        LinearShape(17, 40, 100, "int8", "row_u8", has_bias=True, has_residual=True),
        LinearShape(17, 40, 300, "int2", "block", 64, has_bias=True),
        LinearShape(17, 40, 70, "int4", group_size=32, has_zero_points=True, has_bias=True),
        LinearShape(17, 40, 70, "int8", has_residual=True),
        LinearShape(17, 40, 70, "int4", group_channels=8, has_zero_points=True),
    ],
    ids=name,
)
def test_a_row_is_the_same_bits_in_any_number_of_rows(
    shape: LinearShape, target: Target, isa: Isa
) -> None:
    case = random_case(shape, isa)
    whole = case.run(target, isa)
    other_tiles = case.run(target, isa, {"mr": 3, "nv": 2, "ku": 16, "gu": 2, "pf": 1}, cuts=(2,))
    np.testing.assert_array_equal(whole.view(np.uint32), other_tiles.view(np.uint32))
    row = 11
    one = Case(
        same_shape(shape, m=1),
        {k: v[row : row + 1] for k, v in case.activations.items()},
        case.weights,
        {k: v[row : row + 1] if k == "residual" else v for k, v in case.addends.items()},
    )
    alone = one.run(target, isa)
    np.testing.assert_array_equal(alone.view(np.uint32), whole[row : row + 1].view(np.uint32))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_any_knob_setting_gives_the_same_bits(shape: LinearShape, target: Target, isa: Isa) -> None:
    case = random_case(shape, isa)
    default = case.run(target, isa)
    space = linear.knob_space(shape, isa)
    for values in random.Random(shape.n).sample(list(itertools.product(*space.values())), 5):
        knobs = dict(zip(space, values, strict=True))
        np.testing.assert_array_equal(case.run(target, isa, knobs, cuts=(1,)), default, str(knobs))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 7, 16, 33, 48])
@pytest.mark.parametrize("k", [32, 47, 100])
@pytest.mark.parametrize("m", [1, 2, 17])
def test_awkward_sizes_are_correct(m: int, k: int, n: int) -> None:
    host = Target.load("x86-64-v3")
    isa = isas.get(host.isa)
    for shape in SHAPES:
        case = random_case(same_shape(shape, m=m, n=n, k=k), isa)
        check(case, case.run(host, isa))


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_packed_weights_match_the_kernel_and_do_not_depend_on_rows(
    shape: LinearShape, isa: Isa
) -> None:
    case = random_case(shape, isa)
    packed = linear.pack(shape, isa, linear.Weights(**case.weights))
    tensors = linear.build(shape, isa).tensors
    first = len(case.activations)
    taken = tensors[first : first + len(packed)]
    assert list(packed) == [t.name for t in taken]
    assert list(taken) == linear.packed_weights(shape, isa)
    for tensor in taken:
        assert packed[tensor.name].shape == tensor.shape
        assert packed[tensor.name].dtype == tensor.dtype
    again = linear.pack(same_shape(shape, m=9), isa, linear.Weights(**case.weights))
    assert all(packed[key].tobytes() == again[key].tobytes() for key in packed)
    rest = [t.name for t in tensors[first + len(packed) :] if t.name != "scratch"]
    assert rest == [*case.addends, "y"]


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_equal_layouts_pack_to_equal_bytes(shape: LinearShape) -> None:
    by_layout: dict[str, dict[str, bytes]] = {}
    for isa in map(isas.get, isas.known()):
        weights = linear.Weights(**random_case(shape, isa).weights)
        packed = {k: v.tobytes() for k, v in linear.pack(shape, isa, weights).items()}
        assert by_layout.setdefault(linear.layout(shape, isa), packed) == packed
    assert len(by_layout) == 2  # RISC-V has its own


def test_x86_and_arm_share_their_weights() -> None:
    for shape in SHAPES:
        isa_names = ("avx2", "avx512_vnni", "neon", "neon_dotprod")
        assert len({linear.layout(shape, isas.get(isa)) for isa in isa_names}) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "int3", "activation": "block", "group_size": 32},
        {"format": "int4", "activation": "row_u8"},
        {"format": "int4", "activation": "block"},
        {"format": "int4", "activation": "block", "group_size": 24},
        {"format": "int8", "activation": "row_u8", "group_size": 32},
        {"format": "int8", "activation": "row_u8", "k": 40000},
        {"format": "f32", "has_zero_points": True},
        {"format": "e5m2", "has_zero_points": True},
        {"format": "bf16", "group_size": 32},
        {"format": "int4", "group_size": 32, "float_zero_points": True},
        {"format": "f32", "n": 0},
        {"format": "f32", "group_channels": 16},
        {"format": "int4", "group_channels": 24},
        {"format": "f16", "group_channels": 32},
        {"format": "int4", "activation": "block", "group_size": 8},
        {"format": "int16", "activation": "block", "group_size": 32},
        {"format": "int2", "activation": "row_u8"},
        {"format": "int4", "group_channels": 16, "group_size": 32},
        {"format": "int8", "group_channels": 16, "activation": "row_u8"},
    ],
    ids=lambda fields: "-".join(str(v) for v in fields.values()),
)
def test_an_unsupported_layer_is_refused_by_name(fields: dict[str, object]) -> None:
    with pytest.raises(isas.TargetError, match=r"linear layer .*supported are"):
        LinearShape(**{"m": 1, "n": 16, "k": 64, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scales", "dtype"),
    [
        ([0.5, -0.25, 0.0], "float16"),
        ([65504.0, 2.0**-24], "float16"),
        (list(np.float16([0.01, -0.3])), "float16"),
        ([0.01, 0.5], "float32"),
        ([65520.0], "float32"),
        ([2.0**-25], "float32"),
    ],
)
def test_scales_are_halved_only_where_none_changes(scales: list[float], dtype: str) -> None:
    assert linear.pick_scale_dtype(np.array(scales, np.float32)) == dtype


@pytest.mark.parametrize("kind", FLOAT8)
def test_every_float8_is_widened_exactly(kind: str) -> None:
    target = Target.load("x86-64-v3")
    isa = isas.get(target.isa)
    every = np.arange(256, dtype=np.uint8).view(FLOATS[kind])
    finite = every[np.isfinite(every.astype(np.float32))]
    case = random_case(LinearShape(1, finite.size, 1, kind), isa)
    case.weights["weight"], case.weights["scales"][:] = finite[:, None], 1.0
    case.activations["x"][:] = 1.0
    np.testing.assert_array_equal(case.run(target, isa)[0], finite.astype(np.float32))


def test_a_scale_of_zero_makes_a_zero(target: Target, isa: Isa) -> None:
    shape = LinearShape(1, 16, 32, "int4", group_size=32, **BLOCK16)
    case = random_case(shape, isa)
    case.weights["scales"][3:5] = 0.0
    y = case.run(target, isa)
    assert (y[0, 3:5] == 0.0).all() and (y[0, 5:] != 0.0).all()
