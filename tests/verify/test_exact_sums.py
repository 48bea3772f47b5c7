"""onnxruntime's sums of products are exact, on CPUs where its kernels saturate too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmtvm.verify.exact_sums import exact_session
from slmtvm.verify.unsigned_weights import with_unsigned_weights

K, N, M = 64, 24, 5
FLOAT, UINT8, INT8 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8
RANDOM = np.random.default_rng(3)
# Half of int8's range, where no kernel saturates, so that a changed model equals the original.
WEIGHTS = RANDOM.integers(-63, 64, (K, N)).astype(np.int8)
ROWS = RANDOM.integers(0, 256, (M, K)).astype(np.uint8)
CONSTANTS = {
    "s": np.float32(0.02), "scales": RANDOM.uniform(0.01, 0.03, N).astype(np.float32),
    "az": np.uint8(120), "z": np.int8(-7), "zs": RANDOM.integers(-9, 9, N).astype(np.int8),
    "yz": np.uint8(128), "w": WEIGHTS, "bias": np.zeros(N, np.float32),
    "kernel": WEIGHTS.T.reshape(N, K, 1).copy(),
}  # fmt: skip
# Operator, domain, inputs, attributes, whether the rows are floats
NODES: dict[str, tuple[str, str, list[str], dict[str, int], bool]] = {
    "MatMulInteger": ("MatMulInteger", "", ["x", "w", "az", "z"], {}, False),
    "MatMulInteger-columns": ("MatMulInteger", "", ["x", "w", "az", "zs"], {}, False),
    "MatMulInteger-no zero": ("MatMulInteger", "", ["x", "w"], {}, False),
    "QLinearMatMul": (
        "QLinearMatMul", "", ["x", "s", "az", "w", "scales", "zs", "s", "yz"], {}, False,
    ),
    "QGemm": (
        "QGemm", "com.microsoft", ["x", "s", "az", "w", "s", "z", "", "s", "yz"], {}, False,
    ),
    "MatMulIntegerToFloat": (
        "MatMulIntegerToFloat", "com.microsoft", ["x", "w", "s", "scales", "az", "zs"], {}, False,
    ),
    "DynamicQuantizeMatMul": (
        "DynamicQuantizeMatMul", "com.microsoft", ["x", "w", "scales", "zs"], {}, True,
    ),
    "DynamicQuantizeMatMul-no zero": (
        "DynamicQuantizeMatMul", "com.microsoft", ["x", "w", "s"], {}, True,
    ),
    "QAttention": (
        "QAttention", "com.microsoft", ["x", "w", "bias", "s", "s", "", "az", "z"],
        {"num_heads": 2}, False,
    ),
    "ConvInteger": ("ConvInteger", "", ["x", "kernel", "az", "z"], {}, False),
    "QLinearConv": (
        "QLinearConv", "", ["x", "s", "az", "kernel", "s", "z", "s", "yz"], {}, False,
    ),
}  # fmt: skip


def model(title: str, weights: np.ndarray = WEIGHTS) -> tuple[onnx.ModelProto, np.ndarray]:
    """The node alone, and its rows."""
    op, domain, inputs, attributes, floats = NODES[title]
    rows = ROWS / np.float32(64) if floats else ROWS
    if "Conv" in op:
        rows = np.ascontiguousarray(rows.T[None])
    if op == "QAttention":
        rows = rows[None]
    constants = {**CONSTANTS, "w": weights}
    result = onnx.ValueInfoProto(name="y")
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"], domain=domain, **attributes)], "g",
        [helper.make_tensor_value_info("x", FLOAT if floats else UINT8, rows.shape)], [result],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in inputs],
    )  # fmt: skip
    return _model(graph), rows


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def plain_session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), _options(), providers=["CPUExecutionProvider"]
    )


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


@pytest.mark.parametrize("title", NODES)
def test_unsigned_weights_give_the_same_results(title: str) -> None:
    original, rows = model(title)
    (want,) = plain_session(original).run(None, {"x": rows})
    shifted = with_unsigned_weights(original)
    assert shifted is not None
    (got,) = plain_session(shifted).run(None, {"x": rows})
    # What rounds floats besides has another kernel; the sums are the same.
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_sums_are_exact_for_the_largest_weights_on_any_cpu() -> None:
    weights = RANDOM.choice(np.array([-128, 127], np.int8), (K, N))
    proto, rows = model("MatMulInteger-no zero", weights)
    (got,) = exact_session(proto, _options()).run(None, {"x": rows})
    np.testing.assert_array_equal(got, rows.astype(np.int64) @ weights)


def test_a_file_keeps_its_weights_in_the_file_beside_it(tmp_path: Path) -> None:
    proto, rows = model("MatMulInteger")
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights", size_threshold=0)
    (got,) = exact_session(path, _options()).run(None, {"x": rows})
    wide = rows.astype(np.int64) - 120
    np.testing.assert_array_equal(got, wide @ (WEIGHTS.astype(np.int64) + 7))


def test_signed_rows_keep_signed_weights() -> None:
    proto, _ = model("MatMulInteger")
    for tensor in proto.graph.initializer:
        if tensor.name == "az":
            tensor.CopyFrom(numpy_helper.from_array(np.int8(5), "az"))
    assert with_unsigned_weights(proto) is None


def test_a_branch_shifts_weights_that_it_has_from_outside() -> None:
    proto, rows = model("MatMulInteger")
    graph = proto.graph
    inner = helper.make_graph(list(graph.node), "then", [], list(graph.output))
    other = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT32)], "else", [],
        [onnx.ValueInfoProto(name="y")],
    )  # fmt: skip
    choice = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=other)
    ports = [*graph.input, helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
    outer = helper.make_graph([choice], "g", ports, list(graph.output), list(graph.initializer))
    shifted = with_unsigned_weights(_model(outer))
    assert shifted is not None
    (got,) = plain_session(shifted).run(None, {"x": rows, "c": np.array(True)})
    wide = rows.astype(np.int64) - 120
    np.testing.assert_array_equal(got, wide @ (WEIGHTS.astype(np.int64) + 7))


def test_a_model_without_signed_products_stays_as_it_is() -> None:
    proto, _ = model("MatMulInteger", WEIGHTS.view(np.uint8))
    for tensor in proto.graph.initializer:
        if tensor.name == "z":
            tensor.CopyFrom(numpy_helper.from_array(np.uint8(5), "z"))
    assert with_unsigned_weights(proto) is None
