"""Layers as SparseML exports them: integers in, integers of weights, one factor for both scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from slmtvm.importer.read.load import load
from slmtvm.importer.rewrite.static_integers import static_products
from tests.importer.graph_builder import GraphBuilder, save

K, N, ROWS = 24, 40, 5


def product(
    folder: Path, *, by_column: bool = False, bias: bool = False, zero: int = 128, other: int = 128
) -> Path:  # fmt: skip
    """x (rows, K) -> y (rows, N): ``zero`` and ``other`` are the zero points of both operators."""
    b = GraphBuilder(np.random.default_rng(0))
    scale, z = b.constant(0.02), b.constant(zero, np.uint8)
    rounded = b.op("QuantizeLinear", "x", scale, z)
    weight = b.constant(b.random.integers(-60, 61, (K, N)), np.int8)  # more saturates there
    columns = (N,) if by_column else ()
    w_zero = b.constant(b.random.integers(-3, 4, columns), np.int8)
    integers = b.op("MatMulInteger", rounded, weight, b.constant(other, np.uint8), w_zero)
    if bias:
        integers = b.op("Add", integers, b.constant(b.random.integers(-500, 500, N), np.int32))
    factor = b.constant(0.02 * (0.5 + b.random.random(columns)) / 100)
    b.op("Mul", b.op("Cast", integers, to=TensorProto.FLOAT), factor)
    b.nodes[-1].output[0] = "y"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, K])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, N])
    return save(b.model([x], [y]), folder)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_static_product_is_one_of_what_both_sides_stand_for(
    by_column: bool, bias: bool, tmp_path: Path
) -> None:
    import onnxruntime

    path = product(tmp_path, by_column=by_column, bias=bias)
    graph = static_products(load(path))
    kinds = [node.op_type for node in graph.nodes]
    wanted = ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    assert kinds == wanted + ["Add"] * bias
    x = np.random.default_rng(1).standard_normal((ROWS, K)).astype(np.float32)
    want = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]
    values = {name: c.values() for name, c in graph.initializers.items()} | {"x": x}
    for node in graph.nodes:
        values[node.outputs[0]] = _computed(node.op_type, [values[i] for i in node.inputs])
    np.testing.assert_allclose(values["y"], want, rtol=1e-5, atol=1e-5)


def _computed(kind: str, inputs: list[np.ndarray]) -> np.ndarray:
    a, b, *zero = inputs
    if kind == "QuantizeLinear":
        return np.clip(np.rint(a / b) + zero[0], 0, 255).astype(np.uint8)
    if kind == "DequantizeLinear":
        return ((a.astype(np.int32) - zero[0].astype(np.int32)) * b).astype(np.float32)
    return a @ b if kind == "MatMul" else a + b


def test_a_product_of_other_zero_points_stays(tmp_path: Path) -> None:
    graph = static_products(load(product(tmp_path, other=127)))
    assert "MatMulInteger" in [node.op_type for node in graph.nodes]
