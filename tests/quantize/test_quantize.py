"""``slmtvm.quantize``: the file that it writes, and what it says of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

import slmtvm
from slmtvm.errors import InvalidModelError, SlmError
from slmtvm.importer import import_onnx
from slmtvm.importer.read.redact import redact
from slmtvm.ir.reference import evaluate_outputs
from slmtvm.quantize.layers import find_layers, normalise
from slmtvm.verify import Reference
from tests.cli.command import slmtvm as command
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.heads import ENCODERS, VOCAB, save_head

TINY = Tiny(hidden=40, heads=5, kv_heads=5, ffn=48, vocab=97, layers=2, tied=True)
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab, 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model and token ids to calibrate with."""
    path = tmp_path_factory.mktemp("quantize")
    save(build(TINY), path)
    np.save(path / "tokens.npy", TOKENS)
    return path


def quantize(folder: Path, name: str, **options):
    return slmtvm.quantize(
        folder / "model.onnx", folder / f"{name}.onnx", calibration=folder / "tokens.npy", **options
    )


def kinds(path: Path) -> set[str]:
    layers = slmtvm.inspect(path).weights
    return {layer.format for layer in layers if layer.kind == "linear"}


@pytest.mark.parametrize("method", ["rtn", "k-quant", "gptq", "awq"])
def test_a_method_writes_int4_that_imports_and_stays_near_the_original(folder, method, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # none of these needs it
    report = quantize(folder, method, method=method)
    path = folder / f"{method}.onnx"
    assert kinds(path) == {"int4"}
    layers = 2 * 7 + 1
    assert len(report.layers) == layers
    assert all(0.03 < layer.weight_error < 0.15 for layer in report.layers)
    assert all(0.01 < layer.output_error < 0.15 for layer in report.layers)
    assert report.bytes_after == path.stat().st_size < report.bytes_before
    assert np.isfinite([report.ppl_before, report.ppl_after]).all()
    assert 0 < report.kl < 0.05


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [16, 128])
def test_eight_bits_lose_less_than_four(folder, group, symmetric):
    options = {"group": group, "symmetric": symmetric}
    four, eight = (quantize(folder, f"bits{b}", bits=b, **options) for b in (4, 8))
    for a, b in zip(four.layers, eight.layers, strict=True):
        assert b.weight_error < a.weight_error / 8
    assert eight.kl < four.kl
    assert eight.bytes_after > four.bytes_after


@pytest.mark.parametrize("method", ["dynamic", "static"])
def test_int8_with_quantized_activations_keeps_the_logits(folder, method):
    report = quantize(folder, method, method=method, bits=8)
    assert report.kl < 0.02
    types = {n.op_type for n in onnx.load(folder / f"{method}.onnx").graph.node}
    wanted = "DynamicQuantizeLinear" if method == "dynamic" else "QuantizeLinear"
    assert wanted in types


def test_awq_never_loses_more_of_a_layer_s_output_than_rounding(folder):
    rtn, awq = (quantize(folder, m, method=m) for m in ("rtn", "awq"))
    total = [sum(layer.output_error**2 for layer in report.layers) for report in (rtn, awq)]
    assert total[1] < total[0]


def test_the_errors_reported_are_those_of_onnxruntime(folder):
    """One layer alone: its weight's error is that of its output for the identity matrix."""
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(50, 24)).astype(np.float32)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Gather", ["table", "input_ids"], ["x"]),
             helper.make_node("MatMul", ["x", "w"], ["logits"], name="only")],
            "g",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "n"])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "n", 24])],
            [numpy_helper.from_array(np.eye(50, dtype=np.float32), "table"),
             numpy_helper.from_array(weight, "w")],
        ),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=9,
    )  # fmt: skip
    onnx.save(model, folder / "one.onnx")
    report = slmtvm.quantize(folder / "one.onnx", folder / "one_q.onnx", group=16)
    quantized = onnx.load(folder / "one_q.onnx")
    for node in quantized.graph.node:
        exact = [a for a in node.attribute if a.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(exact)
    onnx.save(quantized, folder / "one_exact.onnx")
    found = run_onnxruntime(folder / "one_exact.onnx", np.arange(50))
    error = np.linalg.norm(found - weight) / np.linalg.norm(weight)
    assert report.layers[0].weight_error == pytest.approx(error, rel=1e-4)


def test_mixed_keeps_a_size_and_uses_it(folder):
    sizes = [quantize(folder, f"all{bits}", bits=bits).bytes_after for bits in (4, 8)]
    size = sum(sizes) // 2
    report = quantize(folder, "mixed", bits="mixed", size=size)
    assert {layer.bits for layer in report.layers} == {4, 8}
    assert sizes[0] < report.bytes_after <= size
    assert kinds(folder / "mixed.onnx") == {"int4", "int8"}
    with pytest.raises(SlmError, match=r"take .* bytes in 4 bits"):
        quantize(folder, "never", bits="mixed", size=1000)
    assert not (folder / "never.onnx").exists()


def test_embeddings_can_be_quantized_too(folder):
    without, with_them = (
        quantize(folder, f"embeddings{e}", embeddings=e, group=16) for e in (False, True)
    )
    assert with_them.bytes_after < without.bytes_after
    table = slmtvm.inspect(folder / "embeddingsTrue.onnx").weights[0]
    assert (table.kind, table.format) == ("embedding", "int4")


def test_excluded_layers_stay_as_they_are(folder):
    layers = find_layers(_normal(folder / "model.onnx"))
    report = quantize(folder, "excluded", exclude=[f"{layers[-1].weight}*", layers[0].name])
    assert [layer.name for layer in report.layers] == [layer.name for layer in layers[1:-1]]
    assert kinds(folder / "excluded.onnx") == {"int4", "f32"}


def _normal(path: Path) -> onnx.ModelProto:
    model = onnx.load(path)
    normalise(model)
    return model


def test_gemm_and_transposed_weights_are_brought_to_one_form_without_a_change(tmp_path):
    rng = np.random.default_rng(2)
    table, w, head = (rng.normal(size=s).astype(np.float32) for s in ((9, 6), (5, 6), (7, 5)))
    bias = rng.normal(size=5).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Squeeze", ["rows"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["h"], transB=1),
        helper.make_node("Transpose", ["head"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "turned"], ["y"]),
        helper.make_node("Unsqueeze", ["y", "zero"], ["logits"]),
    ]
    constants = {"table": table, "w": w, "b": bias, "head": head, "zero": np.array([0])}
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "n"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "n", 7])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    tokens = np.array([3, 1, 8])
    before = run_onnxruntime(save(model, tmp_path), tokens)
    normalise(model)
    assert [layer.shape for layer in find_layers(model)] == [(6, 5), (5, 7)]
    assert np.abs(run_onnxruntime(save(model, tmp_path), tokens) - before).max() < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "there are rtn"),
        ({"bits": 3}, "4, 8 or mixed"),
        ({"group": 20}, "groups of 20"),
        ({"method": "gptq", "calibration": None}, "needs a calibration"),
        ({"method": "dynamic"}, "to 8 bits"),
        ({"method": "k-quant", "symmetric": True}, "cannot be symmetric"),
        ({"method": "k-quant", "group": 64}, "takes groups"),
        ({"size": 10}, "with mixed bits only"),
        ({"calibration": "absent.npy"}, "no such file"),
        ({"calibration": "model.onnx"}, "UTF-8|no tokenizer"),
        ({"calibration": "text.txt"}, "no tokenizer to read"),
        ({"calibration": "floats.npy"}, "integers"),
        ({"exclude": ["*"]}, "no linear layer"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(folder, options, message):
    np.save(folder / "floats.npy", np.zeros(9))
    (folder / "text.txt").write_text("some text")
    options = {"calibration": "tokens.npy", **options}
    if options["calibration"] is not None:
        options["calibration"] = folder / options["calibration"]
    with pytest.raises(SlmError, match=message):
        slmtvm.quantize(folder / "model.onnx", folder / "refused.onnx", **options)
    assert not (folder / "refused.onnx").exists()


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"nothing like it")
    with pytest.raises(InvalidModelError, match=r"bad\.onnx"):
        slmtvm.quantize(tmp_path / "bad.onnx", tmp_path / "out.onnx")


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_the_numbers(folder):
    result = command(
        "quantize", folder / "model.onnx", "-o", folder / "command.onnx", "--calibration",
        folder / "tokens.npy", "--bits", "mixed", "--json", folder / "numbers.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "perplexity" in result.stdout and "weight error" in result.stdout
    numbers = json.loads((folder / "numbers.json").read_text())
    assert {layer["bits"] for layer in numbers["layers"]} == {4, 8}


def test_a_redacted_file_imports_like_the_original_without_its_weights(folder):
    quantize(folder, "whole", bits="mixed")
    for name in ("model", "whole"):
        stripped = redact(folder / f"{name}.onnx")
        onnx.save(stripped, folder / "redacted.onnx")
        values = b"".join(t.raw_data for t in onnx.load(folder / f"{name}.onnx").graph.initializer)
        kept = b"".join(t.raw_data for t in stripped.graph.initializer)
        assert len(kept) < len(values) / 20
        first, second = (import_onnx(folder / f"{n}.onnx") for n in (name, "redacted"))
        assert _operations(first) == _operations(second)
        assert {k: v.shape for k, v in first.params.items()} == {
            k: v.shape for k, v in second.params.items()
        }


def _operations(model):
    bindings = [b for block in model.module["main"].body.blocks for b in block.bindings]
    return [b.value.op.name for b in bindings if isinstance(b.value, relax.Call)]


@pytest.mark.parametrize("name", ["classifier", "span", "tokens_and_embedding"])
def test_heads_are_quantized_and_compared_by_their_cosine(name, tmp_path):
    path = save_head(ENCODERS[name], tmp_path, types="table")
    tokens = np.random.default_rng(0).integers(2, VOCAB, 60)
    np.save(tmp_path / "tokens.npy", tokens)
    target = tmp_path / "small.onnx"
    report = slmtvm.quantize(path, target, group=16, calibration=tmp_path / "tokens.npy")
    assert report.ppl_before is None and report.cosine > 0.97
    model = import_onnx(target)
    assert [o.name for o in model.outputs] == list(ENCODERS[name].outputs)
    tokens = tokens[:20]
    for ours, theirs in zip(
        evaluate_outputs(model, tokens),
        Reference(target).run(tokens, ENCODERS[name].outputs),
        strict=True,
    ):
        a, b = ours.reshape(-1), theirs.reshape(-1)
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999
