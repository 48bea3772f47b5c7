"""What onnxruntime computes wrongly is found by known sums, and computed by other kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmtvm.verify import exact_sums, known_sums
from slmtvm.verify.block_products import float_weights, with_float_weights
from slmtvm.verify.exact_sums import open_exact
from slmtvm.verify.known_sums import Form, forms_of, is_right

FLOAT, FLOAT16, UINT8, INT32 = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.INT32,
)  # fmt: skip
PLAIN = int(onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
K, N, BLOCK = 64, 24, 16


def block_form(
    kind: int, bits: int, accuracy: int, zeros: int = 0, index: int = 0, bias: int = 0
) -> Form:
    attributes = (("accuracy_level", accuracy), ("bits", bits), ("block_size", BLOCK))
    return Form("com.microsoft", "MatMulNBits", (kind, UINT8, kind, zeros, index, bias), attributes)


FORMS = [
    *(Form("", name) for name in ("MatMulInteger", "QLinearMatMul", "ConvInteger", "QLinearConv")),
    *(
        Form("com.microsoft", name)
        for name in ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm")
    ),
    *(block_form(kind, bits, 4) for kind in (FLOAT, FLOAT16) for bits in (2, 4, 8)),
    *(block_form(FLOAT, bits, 0, zeros) for bits in (2, 4, 8) for zeros in (UINT8, FLOAT)),
    *(block_form(FLOAT, bits, 4, zeros, INT32) for bits in (2, 4, 8) for zeros in (0, UINT8)),
    block_form(FLOAT16, 4, 0, UINT8, INT32, FLOAT16),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_is_right_by_some_kernels_of_this_onnxruntime(form: Form) -> None:
    ways = ((True, False), (False, False), (True, True))
    assert any(is_right(form, PLAIN, prepacked=p, remedied=r) for p, r in ways)
    assert is_right(form, PLAIN, prepacked=True, remedied=True)


def test_a_form_that_no_onnxruntime_has_is_not_right() -> None:
    form = Form("com.microsoft", "MatMulNBits", (FLOAT, UINT8, FLOAT), (("block_size", 17),))
    assert not is_right(form, PLAIN, prepacked=True, remedied=False)


def block_model(
    *, bits: int = 4, bias: bool = True, level: int = 0, kind: type[np.floating] = np.float32
) -> onnx.ModelProto:
    """A product with zero points and g_idx, in a branch that is always taken."""
    random = np.random.default_rng(5)
    groups = K // BLOCK
    constants = {
        "w": random.integers(0, 256, (N, groups, BLOCK * bits // 8)).astype(np.uint8),
        "s": random.uniform(0.01, 0.03, (N, groups)).astype(kind),
        "z": random.integers(0, 256, (N, groups * bits // 8)).astype(np.uint8),
        "g": random.permutation(np.arange(K) // BLOCK).astype(np.int32),
        "b": random.normal(size=N).astype(kind),
    }
    inputs = ["x", "w", "s", "z", "g", *(["b"] if bias else [])]
    node = helper.make_node(
        "MatMulNBits", inputs, ["y"], domain="com.microsoft", K=K, N=N, bits=bits,
        block_size=BLOCK, accuracy_level=level,
    )  # fmt: skip
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", element, ["m", K])],
        [helper.make_tensor_value_info("y", element, ["m", N])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def expected(model: onnx.ModelProto, rows: np.ndarray) -> np.ndarray:
    """Written out once more, value by value."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    node = model.graph.node[0]
    bits = next(a.i for a in node.attribute if a.name == "bits")

    def value(stored: np.ndarray, place: int) -> int:
        byte = int(stored[place * bits // 8])
        return byte >> (place * bits % 8) & ((1 << bits) - 1)

    weight = np.empty((K, N))
    for n in range(N):
        for k in range(K):
            group = int(constants["g"][k])
            zero = value(constants["z"].reshape(N, -1)[n], group)
            quantum = value(constants["w"].reshape(N, -1)[n], k) - zero
            weight[k, n] = quantum * float(constants["s"][n, group])
    bias = constants["b"].astype(float) if len(node.input) > 5 else 0.0
    return np.asarray(rows.astype(float) @ weight + bias)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_zero_points_beside_g_idx_are_not_ignored(bits: int, bias: bool, tmp_path: Path) -> None:
    model = block_model(bits=bits, bias=bias)
    rows = np.random.default_rng(6).normal(size=(3, K)).astype(np.float32)
    want = expected(model, rows)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    exact = open_exact(onnx.load(path, load_external_data=False), path, _options())
    (got,) = exact.session.run(None, {"x": rows})
    np.testing.assert_allclose(got, want, atol=1e-4 * np.ptp(want))
    assert not exact.doubts


def test_products_keep_the_type_that_they_had() -> None:
    model = block_model(kind=np.float16)
    rows = np.random.default_rng(6).normal(size=(3, K)).astype(np.float16)
    want = expected(model, rows)
    with_float_weights(model, lambda _: True, None)
    session = onnxruntime.InferenceSession(model.SerializeToString(), _options())
    (got,) = session.run(None, {"x": rows})
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, want, atol=5e-3 * np.ptp(want))


def test_weights_without_zero_points_are_around_half_of_their_range() -> None:
    operands = {"weight": np.array([[[0x80] * 8]], np.uint8), "scales": np.ones((1, 1), np.float32)}
    found = float_weights({"N": 1, "K": 16, "block_size": 16, "bits": 4}, operands)
    assert found[:, 0].tolist() == [-8, 0] * 8


def test_forms_are_found_in_branches_and_functions() -> None:
    inner = block_model()
    graph = inner.graph
    branch = helper.make_graph(list(graph.node), "then", [], [onnx.ValueInfoProto(name="y")])
    other = helper.make_graph(
        [helper.make_node("MatMulInteger", ["q", "v"], ["n"]),
         helper.make_node("Cast", ["n"], ["y"], to=FLOAT)], "else", [],
        [onnx.ValueInfoProto(name="y")],
    )  # fmt: skip
    choice = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other)
    del graph.node[:]
    graph.node.append(choice)
    assert set(forms_of(inner)) == {
        block_form(FLOAT, 4, 0, UINT8, INT32, FLOAT), Form("", "MatMulInteger"),
    }  # fmt: skip


def test_attention_on_bytes_is_probed_as_the_product_that_it_is_made_of() -> None:
    node = helper.make_node("QAttention", ["x", "w"], ["y"], domain="com.microsoft")
    assert known_sums.form_of(node, {}) == Form("", "MatMulInteger")


def test_layouts_are_turned_off_where_that_alone_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(_form: Form, _level: int, *, prepacked: bool, remedied: bool) -> bool:
        return not prepacked

    monkeypatch.setattr(exact_sums, "is_right", fake)
    options = _options()
    assert not open_exact(block_model(), None, options).doubts
    assert options.get_session_config_entry(known_sums.DISABLE_PREPACKING) == "1"


def test_what_no_kernel_computes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_sums, "is_right", lambda *_args, **_options: False)
    (doubt,) = open_exact(block_model(), None, _options()).doubts
    assert "MatMulNBits" in doubt and "zero points, g_idx, bias" in doubt
    assert onnxruntime.__version__ in doubt


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options
