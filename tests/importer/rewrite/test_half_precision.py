"""Graphs in half precision: the weights' bits stay, the rest is computed in float32.

onnxruntime's own result in float16 is rounded at every node, and it has few bfloat16 kernels: the
reference is what it computes on the same weights, rounded to half precision, in a float32 graph.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmtvm.importer import import_onnx
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.spellings import MASKS, NORMS, ROPES
from tests.importer.test_builder_graphs import Built, write
from tests.importer.test_import_spellings import op_names

TOLERANCE = 2e-4  # of the logits' range
HALVES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
LOWEST = -6e4  # a number of both


def rounded(value: np.ndarray, half: int) -> np.ndarray:
    return np.maximum(value, LOWEST).astype(helper.tensor_dtype_to_np_dtype(half))


def in_halves(model: onnx.ModelProto, half: int) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """``model`` in half precision throughout, and with the same numbers in float32."""
    result = onnx.ModelProto.FromString(model.SerializeToString())
    for mine, same in zip(result.graph.initializer, model.graph.initializer, strict=True):
        if mine.data_type == TensorProto.FLOAT:
            value = rounded(numpy_helper.to_array(mine), half)
            mine.CopyFrom(numpy_helper.from_array(value, mine.name))
            same.CopyFrom(numpy_helper.from_array(value.astype(np.float32), same.name))
    for node in result.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = half
    for port in (*result.graph.input, *result.graph.output):
        if port.type.tensor_type.elem_type == TensorProto.FLOAT:
            port.type.tensor_type.elem_type = half
    return result, model


SPELLINGS = [
    Tiny(rope="rotate_half", heads=4, kv_heads=2, layers=2),
    Tiny(rope="interleaved", bias=True, packed_qkv=True),
    Tiny(learned_positions=70, activation="gelu_tanh", tied=True),
    *(Tiny(norm=norm) for norm in NORMS),
    *(Tiny(mask=mask, learned_positions=70) for mask in MASKS),
    *(Tiny(rope=rope, scale_on="both") for rope in ROPES),
]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("tiny", SPELLINGS, ids=str)
def test_every_spelling_is_recognised_in_half_precision(tiny, half, tmp_path):
    tiny = replace(tiny, vocab=67)
    plain = import_onnx(save(build(tiny), tmp_path), context=64)
    halved, same = in_halves(build(tiny), HALVES[half])
    model = import_onnx(save(halved, tmp_path), context=64)
    path = save(same, tmp_path, "float32.onnx")
    tokens = np.random.default_rng(1).integers(0, 67, 45)
    want = run_onnxruntime(path, tokens)
    assert np.abs(evaluate(model, tokens) - want).max() <= TOLERANCE * np.ptp(want)
    assert op_names(model) == op_names(plain)


def test_a_half_precision_cache_and_fused_operators_are_taken(tmp_path):
    built = Built(packed=False, rotary="outside", skip_bias=True)
    halved, same = in_halves(write(built), TensorProto.FLOAT16)
    model = import_onnx(save(halved, tmp_path), context=64)
    tokens = np.arange(40)
    want = run_onnxruntime(save(same, tmp_path, "float32.onnx"), tokens)
    assert np.abs(evaluate(model, tokens) - want).max() <= TOLERANCE * np.ptp(want)


def test_float16_weights_keep_their_bits(tmp_path):
    halved, _ = in_halves(build(Tiny(rope="rotate_half")), TensorProto.FLOAT16)
    model = import_onnx(save(halved, tmp_path), context=64)
    stored = {t.name: numpy_helper.to_array(t) for t in halved.graph.initializer}
    for name in ("embedding.weight", "head.weight"):
        assert model.params[name].dtype == np.float16
        original = stored[name] if name.startswith("embedding") else stored[name].T
        assert np.array_equal(model.params[name], original)
    assert {layer.format for layer in model.layers if layer.kind == "linear"} == {"f16"}


def test_a_table_computed_from_halves_is_not_rounded_to_them(tmp_path):
    """The file casts rotary angles to float16; their cosines are those of float32."""
    tiny = Tiny(rope="rotate_half")
    halved, _ = in_halves(build(tiny), TensorProto.FLOAT16)
    model = import_onnx(save(halved, tmp_path), context=64)
    half = tiny.head_dim // 2
    frequencies = (10000.0 ** (-np.arange(half) / half)).astype(np.float16).astype(np.float32)
    angles = np.arange(64, dtype=np.float32)[:, None] * frequencies
    assert np.allclose(model.params["rope.cos"], np.cos(angles), atol=1e-6)
