"""The reference meaning of canonical ops against onnxruntime's own kernels, one op at a time."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from slmtvm.ir.reference import dequantize, quantize_blocks, quantize_rows, unpack_int4


def run(node: onnx.NodeProto, x: np.ndarray, **constants: np.ndarray) -> list[np.ndarray]:
    ports = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)]
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", ports, outputs, weights)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})


@pytest.mark.parametrize(("k", "n", "block"), [(256, 64, 32), (100, 33, 16), (33, 5, 32)])
@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("with_zero_points", [False, True])
def test_a_linear_layer_of_int4_blocks(k, n, block, level, with_zero_points):
    rng = np.random.default_rng(0)
    groups = -(-k // block)
    packed = rng.integers(0, 256, (n, groups, block // 2), dtype=np.uint8)
    scales = rng.normal(size=(n, groups)).astype(np.float32)
    zeros = rng.integers(0, 256, (n, -(-groups // 2)), dtype=np.uint8)
    x = rng.normal(size=(5, k)).astype(np.float32)
    constants = {"w": packed, "s": scales}
    if with_zero_points:
        constants["z"] = zeros
    node = helper.make_node(
        "MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft",
        K=k, N=n, bits=4, block_size=block, accuracy_level=level,
    )  # fmt: skip
    (want,) = run(node, x, **constants)
    w = dequantize(
        packed.reshape(n, -1), scales, unpack_int4(zeros, groups) if with_zero_points else None,
        format="int4", group_size=block, columns=k,
    )  # fmt: skip
    got = (quantize_blocks(x, block) if level == 4 else x) @ w.T
    assert np.abs(got - want).max() <= 1e-6 * np.ptp(want)


SPECIAL_ROWS = {
    "zeros": np.zeros(8, np.float32),
    "positive": np.linspace(1, 9, 8, dtype=np.float32),
    "negative": -np.linspace(1, 9, 8, dtype=np.float32),
    "halves": np.array([-127.5, 127.5, 0.5, 1.5, 2.5, -0.5, -1.5, 3.5], np.float32),
    "tiny": np.full(8, 1e-30, np.float32),
    "random": np.random.default_rng(0).normal(size=8).astype(np.float32),
}


@pytest.mark.parametrize("name", SPECIAL_ROWS)
def test_a_row_is_quantized_as_dynamic_quantize_linear_does_it(name):
    x = SPECIAL_ROWS[name][None]
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"])
    q, scale, zero = run(node, x)
    want = (q.astype(np.int32) - int(zero)) * scale
    np.testing.assert_allclose(quantize_rows(x), want, rtol=1e-6, atol=1e-37)


def test_rows_are_quantized_each_on_its_own():
    x = np.stack(list(SPECIAL_ROWS.values()))
    alone = np.concatenate([quantize_rows(row[None]) for row in x])
    np.testing.assert_array_equal(quantize_rows(x), alone)


def test_blocks_of_zeros_stay_zero():
    x = np.zeros((2, 40), np.float32)
    x[1, 33] = 3
    np.testing.assert_allclose(quantize_blocks(x, 32), x)
