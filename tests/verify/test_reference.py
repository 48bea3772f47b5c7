"""The oracle feeds every kind of graph and says plainly when it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from slmtvm.errors import InvalidModelError, SlmError, UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.reference import evaluate
from slmtvm.verify import Reference
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.test_builder_graphs import Built, write
from tests.models import heldout_ids, model_path
from tests.models.corpus import corpus_path


def test_a_graph_with_past_inputs_gives_what_the_graph_without_them_gives() -> None:
    tokens = heldout_ids()[:40]
    plain = Reference(model_path("float32")).rows(tokens)
    past = Reference(model_path("with_past")).rows(tokens)
    assert plain.shape == past.shape == (40, 4096)
    assert plain.dtype == np.float32
    assert np.abs(plain - past).max() < 1e-4


def _save(path: Path, op: str, *, domain: str = "", input_name: str = "input_ids") -> Path:
    inputs = [helper.make_tensor_value_info(input_name, TensorProto.INT64, ["batch", "seq"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.INT64, ["batch", "seq"])]
    node = helper.make_node(op, [input_name], ["logits"], domain=domain)
    graph = helper.make_graph([node], "graph", inputs, outputs)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("made.up", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("op", "domain", "input_name", "words"),
    [
        ("Mystery", "made.up", "input_ids", "Mystery"),
        ("Identity", "", "pixels", "'pixels'"),
        ("Identity", "", "input_ids", "must be (batch, sequence, features)"),
    ],
)
def test_a_graph_that_cannot_be_an_oracle_is_refused_by_name(
    tmp_path: Path, op: str, domain: str, input_name: str, words: str
) -> None:
    path = _save(tmp_path / "model.onnx", op, domain=domain, input_name=input_name)
    with pytest.raises(UnsupportedOpError) as caught:
        Reference(path).rows([1, 2, 3])
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_a_missing_or_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(model_path("demo").read_bytes()[:5000])
    for path in (damaged, tmp_path / "missing.onnx"):
        with pytest.raises(InvalidModelError, match=path.name):
            Reference(path)


def test_a_file_of_a_fixed_length_is_fed_hidden_tokens_behind_the_others(tmp_path: Path) -> None:
    model = onnx.load(corpus_path("bert-optimum"))
    tokens = np.arange(3, 12)
    want = Reference(corpus_path("bert-optimum")).rows(tokens)
    for port in model.graph.input:
        for place, size in enumerate((1, 16)):
            port.type.tensor_type.shape.dim[place].dim_value = size
    reference = Reference(save(model, tmp_path))
    assert (reference.fixed_length, reference.takes_mask) == (16, True)
    assert np.abs(reference.rows(tokens) - want).max() <= 1e-5 * np.ptp(want)
    assert Reference(corpus_path("bert-optimum")).fixed_length == 0


def test_a_token_out_of_range_is_an_error_of_ours() -> None:
    with pytest.raises(SlmError, match=r"float32\.onnx"):
        Reference(model_path("float32")).rows([1_000_000])


def test_caches_are_fed_empty_and_the_columns_of_convolutions_zero(tmp_path: Path) -> None:
    path = _save(tmp_path / "model.onnx", "Identity")
    model = onnx.load(path)
    shapes = {
        "past_key_values.0.key": ["batch", 2, "past", 8],
        "past_key_values.1.key": [1, 2, "past", 8],
        "past_conv.2": ["batch", 4, 3],
    }
    for name, shape in shapes.items():
        port = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        model.graph.input.append(port)
    branch = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    model.graph.input.append(branch)
    onnx.save(model, path)
    feeds = Reference(path).feeds([1, 2, 3])
    assert feeds["past_key_values.0.key"].shape == (1, 2, 0, 8)
    assert feeds["past_key_values.1.key"].shape == (1, 2, 0, 8)
    assert feeds["past_conv.2"].shape == (1, 4, 3) and not feeds["past_conv.2"].any()
    assert feeds["use_cache_branch"].tolist() == [False]


@pytest.mark.parametrize("window", [-1, 5])
def test_a_cache_whose_head_dim_is_symbolic_is_fed_as_the_attention_needs_it(
    window: int, tmp_path: Path
) -> None:
    """As onnxruntime-genai's builder has it; with a window its cache has the window's size."""
    tokens = np.arange(20)
    attributes = (("local_window_size", window),)
    plain = write(Built(attention=attributes))
    want = run_onnxruntime(save(plain, tmp_path), tokens)
    sliding = (("sliding_window_cache", int(window > 0)),)
    model = write(Built(attention=attributes + sliding))
    for port in model.graph.input:
        if port.name.startswith("past"):
            port.type.tensor_type.shape.dim[3].dim_param = "kv_cache_dim"
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            dims = ["batch", "seq", 4 * 16]
            model.graph.value_info.append(
                helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, dims)
            )
    got = Reference(save(model, tmp_path, "symbolic.onnx")).rows(tokens)
    assert np.abs(got - want).max() <= 1e-5 * np.ptp(want)


def test_a_file_that_computes_in_bfloat16_has_its_numbers_in_float32() -> None:
    path = corpus_path("phi3-dynamo-bfloat16")
    tokens = np.arange(3, 20)
    want = evaluate(import_onnx(path, context=24), tokens)
    assert np.abs(Reference(path).rows(tokens) - want).max() <= 2e-4 * np.ptp(want)
