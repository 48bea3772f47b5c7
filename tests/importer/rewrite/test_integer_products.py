"""Products of integers that dynamic quantization makes where no weight meets fresh activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.quantized import TINY, TOLERANCE
from tests.importer.test_import_spellings import calls_of
from tests.models.corpus import corpus_path

_KINDS = [QuantType.QInt8, QuantType.QUInt8]


def quantized(model: onnx.ModelProto, folder: Path, **options) -> Path:
    path = folder / "quantized.onnx"
    quantize_dynamic(save(model, folder), path, **options)
    return path


def agrees_on_single_tokens(path: Path) -> CanonicalModel:
    """Where all rows of a call are one, ranges over them and over each are the same."""
    model = import_onnx(path, context=32)
    for token in (3, 50, 21):
        want = run_onnxruntime(path, np.array([token]))
        got = evaluate(model, np.array([token]))
        assert np.abs(got - want).max() <= TOLERANCE * np.ptp(want)
    return model


def projecting(tiny: Tiny, *, residual: bool) -> onnx.ModelProto:
    """A model whose first layer reads the table at once: OPT-350m's, or OLMo 2's whose residual
    does so too."""
    model = build(tiny)
    (node,) = (n for n in model.graph.node if n.input and n.input[0] == "embedding.weight")
    place = list(model.graph.node).index(node) + 1
    weight = np.random.default_rng(3).normal(size=(tiny.hidden, tiny.hidden)) / tiny.hidden**0.5
    tensor = numpy_helper.from_array(weight.astype(np.float32), "project.weight")
    model.graph.initializer.append(tensor)
    result = node.output[0]
    node.output[0] = "rows"
    nodes = [helper.make_node("MatMul", ["rows", "project.weight"], ["projected"], "project")]
    if residual:
        nodes.append(helper.make_node("Add", ["projected", "rows"], [result], "residual"))
    else:
        nodes[0].output[0] = result
    for offset, new in enumerate(nodes):
        model.graph.node.insert(place + offset, new)
    return model


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "with a residual"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", _KINDS, ids=str)
def test_a_layer_that_reads_the_table_at_once_keeps_its_integers(
    kind, per_channel, residual, tmp_path
):
    model = projecting(TINY, residual=residual)
    path = quantized(model, tmp_path, weight_type=kind, per_channel=per_channel)
    (product,) = (n for n in onnx.load(path).graph.node if n.name == "project_quant")
    assert product.op_type == "MatMulInteger" and product.input[0] == "rows_quantized"
    imported = agrees_on_single_tokens(path)
    (table,) = calls_of(imported, "slm.embedding")
    first = calls_of(imported, "slm.linear")[0]
    assert (str(table.attrs["format"]), str(first.attrs["format"])) == ("int8", "int8")
    assert (str(first.attrs["activation"])) == "f32"  # the integers that it reads are no new ones
    assert calls_of(imported, "slm.quantize_dequantize")


@pytest.mark.parametrize(
    "tiny",
    [TINY, Tiny(mask="none", rope="rotate_half"), Tiny(rope="interleaved")],
    ids=["grouped", "encoder", "interleaved"],
)
def test_products_of_quantized_activations_are_attentions(tiny, tmp_path):
    options = {"MatMulConstBOnly": False}
    path = quantized(build(tiny), tmp_path, weight_type=QuantType.QInt8, extra_options=options)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert "MatMul" not in kinds
    imported = agrees_on_single_tokens(path)
    assert len(calls_of(imported, "slm.attention")) == 1
    assert any("probabilities of attentions" in note for note in imported.notes)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["bert-optimum", "gpt2-script-masked"])
def test_exports_import_with_quantized_products(cell, tmp_path):
    """As optimum's quantizer writes them; sequences within what rounding alone does."""
    path = tmp_path / "quantized.onnx"
    options = {"MatMulConstBOnly": False}
    quantize_dynamic(corpus_path(cell), path, weight_type=QuantType.QInt8, extra_options=options)
    imported = agrees_on_single_tokens(path)
    tokens = np.random.default_rng(1).integers(0, imported.vocab_size, 12)
    got, want = evaluate(imported, tokens), run_onnxruntime(path, tokens)
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
    assert ((got * want).sum(axis=1) / norms).min() >= 0.999
