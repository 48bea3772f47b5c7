"""``slmtvm.inspect``: what it says of a file."""

from __future__ import annotations

import json

import pytest
from onnx import helper

from slmtvm.errors import InvalidModelError
from slmtvm.inspect import inspect
from tests.importer.graph_builder import save
from tests.importer.graphs import Tiny, build
from tests.models.corpus import corpus_path
from tests.models.forms import DEMO_FORM, model_path


def test_the_demo_model_s_report_has_all_its_numbers():
    report = inspect(model_path(DEMO_FORM))
    assert (report.family, report.kind, report.layers) == ("llama", "decoder", 6)
    assert (report.heads, report.kv_heads, report.head_dim) == (8, (4,), (32,))
    assert (report.vocab_size, report.hidden_size, report.context) == (4096, 256, 1024)
    assert report.kv_bytes_per_token == 6 * 2 * 4 * 32 * 2  # float16
    linear = [layer for layer in report.weights if layer.kind == "linear"]
    assert {(layer.format, layer.group_size) for layer in linear} == {("int4", 32)}
    assert sum(n * k for n, k in (layer.shape for layer in linear)) == 5_767_168
    four_bits_and_scales = 4 + 32 / 32
    expected = sum(n * k for n, k in (x.shape for x in linear)) * four_bits_and_scales / 8
    assert sum(layer.weight_bytes for layer in linear) == expected


def test_the_text_shows_layers_quantization_and_sizes():
    text = str(inspect(model_path(DEMO_FORM)))
    for part in ("llama", "6 (8 heads, 4 kv heads, head_dim 32)", "int4 group 32", "3,072 bytes"):
        assert part in text
    assert "nothing was left out" in text


@pytest.mark.parametrize(
    ("cell", "kind", "line"),
    [
        (
            "bert-optimum",
            "keys",
            "mask       arbitrary ones: hidden tokens are keys without weight",
        ),
        ("opt-optimum", "skip", "mask       arbitrary ones: hidden tokens are left out"),
        ("llama-dynamo", "none", "mask       none: "),
    ],
)
def test_it_says_which_masks_a_bundle_would_take(cell, kind, line):
    report = inspect(corpus_path(cell))
    assert report.mask == kind
    assert line in str(report)
    assert bool(report.no_mask) == (kind == "none")


def test_the_dict_form_is_json_and_says_the_same():
    report = inspect(model_path(DEMO_FORM))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["vocab_size"] == report.vocab_size
    assert len(data["weights"]) == len(report.weights)


def test_an_encoder_has_no_cache(tmp_path):
    report = inspect(save(build(Tiny(mask="none", learned_positions=60)), tmp_path))
    assert (report.kind, report.kv_bytes_per_token, report.context) == ("encoder", 0, 60)


def test_what_is_not_supported_is_reported_and_not_raised(tmp_path):
    model = build(Tiny(mask="blind"))
    report = inspect(save(model, tmp_path))
    assert "the mask hides position 0" in report.unsupported
    assert "the mask hides position 0" in str(report)
    assert report.operators["Softmax"] == 1


def test_unknown_operators_are_reported_with_their_nodes(tmp_path):
    model = build(Tiny())
    model.graph.node.append(helper.make_node("Strange", ["logits"], ["y"], name="odd one"))
    report = inspect(save(model, tmp_path))
    assert "ai.onnx.Strange (version 18): 'odd one'" in report.unsupported


def test_outputs_that_are_left_out_are_noted(tmp_path):
    model = build(Tiny())
    model.graph.output.append(helper.make_empty_tensor_value_info("Gather_2_0"))
    name = next(n.output[0] for n in model.graph.node if n.op_type == "Gather")
    model.graph.output[1].CopyFrom(helper.make_tensor_value_info(name, 1, None))
    report = inspect(save(model, tmp_path))
    (note,) = report.notes
    assert f"output {name!r} is not emitted" in note and "ask for it by name" in note


def test_a_damaged_file_is_an_error(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(InvalidModelError):
        inspect(path)
