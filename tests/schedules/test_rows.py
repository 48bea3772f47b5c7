"""Row kernels compute what their reference says, on every target and at awkward sizes."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmtvm.schedules import rows
from slmtvm.schedules.rows import Pair, RowOp
from slmtvm.schedules.rows.op import EPILOGUES, NORMS, PROLOGUES, STATIC
from slmtvm.schedules.rows.reference import prologue as float_rows
from slmtvm.schedules.rows.reference import (
    quantize_block,
    quantize_row_u8,
    quantize_tensor_u8,
    row_ranges,
    static_levels,
)
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.harness import run

# A few float32 roundings of the row's largest intermediate value.
RELATIVE = 2e-6
EXACT = ("copy", "pair", "rescale")  # prologues that are rounded as the reference is
# Factors of few bits: many results lie half-way between two steps.
SUM = Pair("add", 0.375, 7, 0.125, 100, 0.75, 131)
PRODUCT = Pair("multiply", 0.03, -5, 0.25, 0, 0.015, 3, first=False)


def row_op(prologue: str, epilogue: str, d: int, **fields: Any) -> RowOp:
    eps = 1e-5 if prologue in NORMS else 0.0
    group_size = 32 if epilogue == "block" else 0
    static = {"scale": 0.037, "low": -100, "high": 155} if epilogue in STATIC else {}
    own = {"pair": {"pair": SUM}, "rescale": {"unit": 0.75}}.get(prologue, {})
    given = {"m": 3, "eps": eps, "group_size": group_size, **static, **own, **fields}
    return RowOp(prologue=prologue, epilogue=epilogue, d=d, **given)


def random_inputs(op: RowOp, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of different magnitudes; the last one has negative values only."""
    rng = np.random.default_rng(seed)
    inputs = {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in op.inputs}
    inputs["x"] *= np.float32(10.0) ** np.arange(-1, op.m - 1, dtype=np.float32)[:, None] * 3
    inputs["x"][-1] = -np.abs(inputs["x"][-1])
    if op.pair is not None:
        # Whole steps, as far as float32 has them.
        for name, scale in (("x", op.pair.x_scale), ("other", op.pair.y_scale)):
            steps = rng.integers(-255, 256, inputs[name].shape).astype(np.float32)
            inputs[name] = steps * np.float32(scale)
    if op.prologue == "rescale":
        # Up to what float32 cannot count; half of the steps meet ties.
        counts = np.rint(np.float32(10.0) ** rng.uniform(0, 8, inputs["x"].shape))
        inputs["steps"] = np.where(inputs["steps"] > 0, 0.125, 0.0123).astype(np.float32)
        inputs["x"] = np.float32(1 + 1e-7) * (np.sign(inputs["x"]) * counts * inputs["steps"])
        inputs["x"] = inputs["x"].astype(np.float32)
    if op.prologue == "swiglu":
        inputs["constants"] = np.array([1.702, 1.0, 7.0], np.float32)
    return {**inputs, **numbers(op)}


def numbers(op: RowOp) -> dict[str, np.ndarray]:
    """The kernel's input of that name, where it has one."""
    return {"numbers": np.array([*op.numbers.values()], np.float32)} if op.numbers else {}


def check(op: RowOp, target: Target, inputs: dict[str, np.ndarray]) -> None:
    got = run(rows.build(op), inputs, target, cuts=(1,))
    want = rows.reference(op, inputs)
    if op.residual:
        np.testing.assert_array_equal(got["sum"], want["sum"])
    if op.epilogue in STATIC:
        check_static(op, inputs, got)
        return
    if op.prologue in EXACT and op.stores_y:
        np.testing.assert_array_equal(got["y"], want["y"])
    if op.stores_y:
        # 1 + erf(x) cancels for negative x: the error of gelu is one of x, not of the result.
        seen = want["y"] if op.prologue in NORMS else inputs["x"]
        parts = np.abs(seen).reshape(op.m, op.groups, -1).max(2)
        scale = np.maximum(np.repeat(parts, want["y"].shape[1] // op.groups, 1), np.abs(want["y"]))
        np.testing.assert_array_less(np.abs(got["y"] - want["y"]) / scale, RELATIVE)
    if op.epilogue == "f32":
        return
    if op.epilogue == "range":
        for name, value in zip(("low", "high"), row_ranges(got["y"]), strict=True):
            np.testing.assert_array_equal(got[name][: op.m], value, err_msg=name)
        return
    # Quantization is exact; what it quantizes is the kernel's own float result.
    y = got["y"] if op.stores_y else inputs["x"]
    if op.epilogue == "block":
        expected = quantize_block(y, op.group_size)
    else:
        expected = quantize_row_u8(y, op.k_padded, op.storage)
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def check_static(op: RowOp, inputs: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> None:
    """Levels are the nearest ones but for the prologue's rounding; all outputs are of one level."""
    scale = np.float32(op.scale)
    if op.stores_y:
        levels = np.rint(got["y"] / scale)
        np.testing.assert_array_equal(levels.astype(np.float32) * scale, got["y"])
    else:
        levels = got["xq"][:, : op.d].astype(int) + op.low + 128 * (op.storage == "int8")
    ideal = np.clip(float_rows(op, inputs) / op.scale, op.low, op.high)
    assert (np.abs(levels - ideal) <= 0.5 + (0 if op.prologue in EXACT else 1e-4)).all()
    if op.prologue in EXACT:
        floats = float_rows(op, inputs).astype(np.float32)
        np.testing.assert_array_equal(levels, static_levels(op, floats))
    if op.epilogue == "static_u8":
        padding = np.full((op.m, op.k_padded - op.d), -op.low)
        stored = np.hstack([levels - op.low, padding]) - 128 * (op.storage == "int8")
        np.testing.assert_array_equal(got["xq"], stored)
        assert (got["xs"] == scale).all() and (got["xz"] == -op.low).all()


@pytest.fixture(params=EVERY_TARGET)
def target(request: pytest.FixtureRequest) -> Target:
    return Target.load(request.param)


@pytest.mark.parametrize(
    "op",
    [
        row_op("copy", "block", 33),
        row_op("copy", "row_u8", 33, k_multiple=64),
        row_op("rms_norm", "block", 96, residual=True, keep_f32=True),
        row_op("layer_norm", "row_u8", 31, keep_f32=True, storage="int8"),
        row_op("silu_glu", "block", 256, keep_f32=True),
        row_op("gelu_erf", "f32", 7),
        row_op("gelu_tanh", "f32", 96),
        row_op("tanh", "f32", 96),
        row_op("relu", "row_u8", 16, keep_f32=True),
        row_op("layer_norm", "range", 40),
        row_op("copy", "rounded", 33, low=-40000, high=25535, scale=1e-4),
        row_op("gelu_erf", "rounded", 40),
        row_op("layer_norm", "static_u8", 31, keep_f32=True, storage="int8"),
        row_op("copy", "static_u8", 31, low=-128, high=127),
        row_op("pair", "f32", 33),
        row_op("pair", "rounded", 7, pair=SUM.turned, other="features", scale=0.75),
        row_op("pair", "static_u8", 31, keep_f32=True, other="number", scale=0.75),
        row_op("pair", "f32", 17, pair=PRODUCT, other="features"),
        row_op("pair", "static_u8", 40, pair=PRODUCT, storage="int8", scale=0.015),
        row_op("rescale", "f32", 33),
        row_op("rescale", "rounded", 7, unit=0.0625, scale=0.0625),
        row_op("rescale", "static_u8", 40, storage="int8", keep_f32=True, scale=0.75),
        row_op("rms_norm", "f32", 40, groups=3),
        row_op("layer_norm", "f32", 16, groups=5),
    ],
    ids=lambda op: op.name,
)
def test_a_row_kernel_computes_its_reference(op: RowOp, target: Target) -> None:
    check(op, target, random_inputs(op))


@pytest.mark.slow
@pytest.mark.parametrize("d", [1, 16, 31, 96])
def test_every_row_kernel_at_every_size(d: int, target: Target) -> None:
    # All pairs at one size; at the others each prologue and each epilogue is met.
    pairs = product(PROLOGUES, EPILOGUES) if d == 31 else zip(PROLOGUES, cycle(EPILOGUES))
    for prologue, epilogue in pairs:
        op = row_op(
            prologue,
            epilogue,
            d,
            keep_f32=epilogue in ("block", "row_u8", "static_u8") and prologue != "copy",
        )
        check(op, target, random_inputs(op))


@pytest.mark.parametrize("prologue", ["rms_norm", "gelu_erf"])
@pytest.mark.parametrize("epilogue", ["block", "row_u8"])
def test_keeping_the_float_rows_changes_nothing_else(prologue: str, epilogue: str) -> None:
    op, keeping = (row_op(prologue, epilogue, 70, keep_f32=keep) for keep in (False, True))
    inputs, host = random_inputs(op), Target.load("x86-64-v3")
    plain, kept = (run(rows.build(o), inputs, host) for o in (op, keeping))
    for tensor in op.outputs:
        np.testing.assert_array_equal(plain[tensor.name], kept[tensor.name])


@pytest.mark.parametrize("epilogue", ["block", "row_u8"])
def test_rows_without_a_range_quantize_to_finite_numbers(epilogue: str) -> None:
    op = row_op("copy", epilogue, 32, m=4)
    x = np.zeros((4, 32), np.float32)
    x[1] = -0.0
    x[2] = 1e-42
    x[3] = 5.0
    got = run(rows.build(op), {"x": x, **numbers(op)}, Target.load("x86-64-v3"))
    assert np.isfinite(got["xs"]).all()
    assert not got["xq"][:2].any()
    if epilogue == "block":
        assert not got["xq"][2].any() and not got["xs"][:3].any() and not got["xsum"][:3].any()
    else:
        np.testing.assert_array_equal(got["xs"][:2], 1.0)
        np.testing.assert_array_equal(got["xz"], 0)


def dynamic_quantize_linear(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What onnxruntime makes of one row."""
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    graph = helper.make_graph(
        [node], "row",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("q", TensorProto.UINT8, x.shape),
         helper.make_tensor_value_info("s", TensorProto.FLOAT, []),
         helper.make_tensor_value_info("z", TensorProto.UINT8, [])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    q, s, z = session.run(None, {"x": x})
    return q, s, z


def test_row_u8_is_dynamic_quantize_linear() -> None:
    m, d = 64, 256
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((m, d)) * rng.uniform(0.01, 30, (m, 1))).astype(np.float32)
    x[: m // 2] += rng.uniform(-20, 20, (m // 2, 1)).astype(np.float32)
    # Multiples of half a step: rounding has to resolve ties.
    x[0] = np.linspace(-64, 63.5, d)
    x[1] = np.linspace(0, 127.5, d)
    x[2, 5], x[3, 7], x[4, :3] = np.nan, np.inf, (3e38, -3e38, np.nan)
    op = row_op("copy", "row_u8", d, m=m)
    got = run(rows.build(op), {"x": x, **numbers(op)}, Target.load("x86-64-v3"))
    for i in range(m):
        if np.isnan(x[i]).any():  # onnxruntime passes over what is no number
            assert np.isnan(got["xs"][i])
            continue
        q, s, z = dynamic_quantize_linear(x[i])
        np.testing.assert_array_equal(got["xs"][i], s)
        np.testing.assert_array_equal(got["xz"][i], z)
        np.testing.assert_array_equal(got["xq"][i], q)


def quantize_linear(x: np.ndarray, scale: float, zero: np.ndarray) -> np.ndarray:
    """What onnxruntime makes of x."""
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    kind = helper.np_dtype_to_tensor_dtype(zero.dtype)
    graph = helper.make_graph(
        [node], "row",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("q", kind, x.shape)],
        [numpy_helper.from_array(np.array(scale, np.float32), "s"),
         numpy_helper.from_array(zero, "z")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (q,) = session.run(None, {"x": x})
    return q


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
def test_static_rounding_is_quantize_linear(dtype: type) -> None:
    """Zeros, ties, infinities, what is no number, and values far outside of the range."""
    limits, zero = np.iinfo(dtype), np.array(dtype(3 if dtype != np.uint16 else 30000))
    scale, d = 0.25, 256
    x = np.random.default_rng(1).standard_normal((3, d)).astype(np.float32) * 40
    x[0] = np.linspace(-d / 2, d / 2 - 0.5, d) * np.float32(0.125)
    x[1, :8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-42]
    low, high = limits.min - int(zero), limits.max - int(zero)
    op = row_op("copy", "rounded", d, low=low, high=high, scale=scale)
    got = run(rows.build(op), {"x": x, **numbers(op)}, Target.load("x86-64-v3"))["y"]
    want = (quantize_linear(x, scale, zero).astype(np.int64) - int(zero)).astype(np.float32)
    want[np.isnan(x)] = np.nan  # onnxruntime makes the lowest level of it
    np.testing.assert_array_equal(got / scale, want)


@pytest.mark.parametrize("epilogue", ["block", "row_u8", "static_u8", "rounded"])
@pytest.mark.parametrize("d", [33, pytest.param(96, marks=pytest.mark.exhaustive)])
def test_what_is_no_number_stays_so(epilogue: str, d: int, target: Target) -> None:
    """Whatever its sign is and wherever it stands, and without changing another row."""
    op = row_op("copy", epilogue, d, m=2 * d + 1)
    x = np.random.default_rng(d).standard_normal((op.m, d)).astype(np.float32)
    plain = run(rows.build(op), {"x": x, **numbers(op)}, target)
    for i in range(d):
        x[2 * i, i], x[2 * i + 1, i] = np.copysign(np.nan, 1), np.copysign(np.nan, -1)
    got = run(rows.build(op), {"x": x, **numbers(op)}, target)
    for name, array in got.items():
        np.testing.assert_array_equal(array[-1], plain[name][-1])
    if epilogue == "rounded":
        np.testing.assert_array_equal(np.isnan(got["y"]), np.isnan(x))
        return
    lost = np.isnan(got["xs"]).reshape(op.m, -1)
    wanted = np.isnan(x)
    if epilogue == "block":
        size = op.group_size
        wanted = np.stack([wanted[:, at : at + size].any(1) for at in range(0, d, size)], 1)
    np.testing.assert_array_equal(lost, wanted if epilogue == "block" else wanted.any(1)[:, None])


@pytest.mark.parametrize("epilogue", ["block", "row_u8"])
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_an_infinity_makes_no_finite_row(epilogue: str, value: float, target: Target) -> None:
    op = row_op("copy", epilogue, 33, m=3)
    x = np.random.default_rng(0).standard_normal((3, 33)).astype(np.float32)
    x[1, 32] = value
    got = run(rows.build(op), {"x": x, **numbers(op)}, target)["xs"].reshape(3, -1)
    assert np.isinf(got[1, -1]) and np.isfinite(got[[0, 2]]).all()


@pytest.mark.parametrize(
    "prologue", ["relu", "silu", "sigmoid", "gelu_erf", "gelu_tanh", "pair", "rescale"]
)
def test_activations_leave_what_is_no_number(prologue: str, target: Target) -> None:
    op = row_op(prologue, "f32", 33)
    inputs = random_inputs(op)
    x = inputs["x"]
    x[1, 4:7] = np.nan, np.copysign(np.nan, -1), np.nan
    got = run(rows.build(op), {**inputs, **numbers(op)}, target)["y"]
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    many = row_op("layer_norm", "block", 100, m=5, keep_f32=True)
    one = row_op("layer_norm", "block", 100, m=1, keep_f32=True)
    inputs, host = random_inputs(many), Target.load("x86-64-v3")
    together = run(rows.build(many), inputs, host, cuts=(2, 3))
    for i in range(5):
        alone = run(rows.build(one), {**inputs, "x": inputs["x"][i : i + 1]}, host)
        for tensor in one.outputs:
            assert alone[tensor.name].tobytes() == together[tensor.name][i : i + 1].tobytes()


@pytest.mark.parametrize("valid", [1, 16, 19])
def test_a_tensor_is_quantized_with_the_range_of_its_valid_rows(target: Target, valid: int) -> None:
    m, d = 19, 33
    op = row_op("copy", "row_u8", d, m=m, storage="int8")
    y = np.random.default_rng(valid).standard_normal((m, d)).astype(np.float32)
    y[valid:] *= 100  # what lies behind must not widen the range
    low, high = (np.full(32, np.nan, np.float32) for _ in range(2))
    low[:m], high[:m] = row_ranges(y)
    kernel = rows.build_quantize_tensor(op)
    got = run(kernel, {"y": y, "low": low, "high": high}, target, valid=valid, cuts=(5,))
    for name, value in quantize_tensor_u8(y, valid, op.k_padded, op.storage).items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_half_of_a_blocks_largest_value_is_rounded_as_the_float32_product_says(
    target: Target,
) -> None:
    op = row_op("copy", "block", 32, m=64)
    x = np.zeros((64, 32), np.float32)
    x[:, 0] = np.random.default_rng(0).random(64) + 0.1
    x[:, 1] = x[:, 0] / 2
    inverse = np.float32(127) / x[:, 0]
    exact = np.rint(x[:, 1].astype(np.float64) * inverse.astype(np.float64))
    assert (exact != np.rint(x[:, 1] * inverse)).any()
    got = run(rows.build(op), {"x": x}, target)
    np.testing.assert_array_equal(got["xq"], quantize_block(x, 32)["xq"])


@pytest.mark.parametrize("d", [64, 70])
@pytest.mark.parametrize("prologue", ["rms_norm", "layer_norm", "silu_glu"])
def test_kernels_of_single_blocks_make_the_bytes_of_those_of_rows(prologue: str, d: int) -> None:
    op = row_op(prologue, "block", d, keep_f32=prologue == "rms_norm")
    host, inputs = Target.load("host"), random_inputs(op)
    given = dict(inputs)
    if rows.by_block.has_statistics(op):
        made = run(rows.by_block.build_statistics(op), inputs, host)
        given[rows.by_block.STATISTICS] = made[rows.by_block.STATISTICS]
    got = run(rows.by_block.build_blocks(op), given, host, cuts=(4,))
    want = run(rows.build(op), inputs, host)
    for tensor in op.outputs:
        assert got[tensor.name].tobytes() == want[tensor.name].tobytes(), tensor.name
