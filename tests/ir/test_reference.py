"""The reference meaning of canonical ops against onnxruntime's own kernels, one op at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tvm
from onnx import helper, numpy_helper
from tvm import relax

from slmtvm.ir import ops
from slmtvm.ir.model import CanonicalModel, KvSpec
from slmtvm.ir.reference import evaluate
from slmtvm.ir.reference.rounding import quantize_blocks, quantize_rows
from slmtvm.ir.reference.weights import dequantize
from slmtvm.schedules.linear.packed_rows import unpack_rows


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
        packed.reshape(n, -1), scales,
        unpack_rows(zeros, groups, 4) if with_zero_points else None,
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


ROWS, HEADS, KV_HEADS, HEAD_DIM = 23, 4, 2, 16


def attention_of(q: np.ndarray, k: np.ndarray, v: np.ndarray, **attrs: float) -> np.ndarray:
    """``slm.attention`` of one layer; rows of q, k and v are looked up by token."""
    tables = {"q": q, "k": k, "v": v}
    params = {
        n: relax.Var(n, relax.TensorType(array.shape, "float32")) for n, array in tables.items()
    }
    tokens = relax.Var("tokens", relax.TensorType((tvm.tirx.Var("m", "int64"),), "int32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [tokens, *params.values()]):
        with builder.dataflow():
            rows = [
                builder.emit(ops.embedding(tokens, p, dim=tables[n].shape[1], format="f32"))
                for n, p in params.items()
            ]
            call = ops.attention(
                *rows, layer=0, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
                mask="causal", **attrs,
            )  # fmt: skip
            output = builder.emit_output(call)
        builder.emit_func_output(output)
    model = CanonicalModel(
        builder.get(), tables, "decoder", "toy", len(q), len(q), q.shape[1], HEADS,
        (KvSpec(KV_HEADS, HEAD_DIM),), Path("toy.onnx"),
    )  # fmt: skip
    return evaluate(model, np.arange(len(q)))


@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_attention_with_a_window_and_a_cap(window, softcap):
    rng = np.random.default_rng(0)
    widths = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    q, k, v = (rng.normal(size=(ROWS, w)).astype(np.float32) for w in widths)
    past = np.zeros((1, KV_HEADS, 0, HEAD_DIM), np.float32)
    node = helper.make_node(
        "GroupQueryAttention", ["x", "k", "v", "past_k", "past_v", "last", "total"],
        ["y", "present_k", "present_v"], domain="com.microsoft", num_heads=HEADS,
        kv_num_heads=KV_HEADS, scale=0.7, softcap=softcap, local_window_size=window or -1,
    )  # fmt: skip
    want = run(
        node, q[None], k=k[None], v=v[None], past_k=past, past_v=past,
        last=np.full((1, 1), ROWS - 1, np.int32), total=np.full(1, ROWS, np.int32),
    )[0]  # fmt: skip
    got = attention_of(q, k, v, scale=0.7, window=window, softcap=softcap)
    np.testing.assert_allclose(got, want[0], atol=3e-6)
