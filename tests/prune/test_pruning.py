"""``slmtvm.prune``: the file that it writes, and what it says of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import quantize_dynamic

import slmtvm
from slmtvm.errors import SlmError
from slmtvm.importer import import_onnx
from slmtvm.ir.reference import evaluate
from slmtvm.quantize.layers import find_layers, normalise, quantized_weight, weight_of
from slmtvm.verify import Reference
from tests.cli.command import slmtvm as command
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build

TINY = Tiny(hidden=40, heads=5, kv_heads=5, ffn=48, vocab=97, layers=2, tied=True)
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab, 700)
LAYERS = 2 * 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and token ids to calibrate with."""
    path = tmp_path_factory.mktemp("prune")
    save(build(TINY), path)
    np.save(path / "tokens.npy", TOKENS)
    return path


def prune(folder: Path, name: str, **options):
    return slmtvm.prune(
        folder / "model.onnx", folder / f"{name}.onnx", calibration=folder / "tokens.npy", **options
    )


def weights(path: Path) -> dict[str, np.ndarray]:
    """Of all layers by name, (n, k)."""
    model = onnx.load(path)
    normalise(model)
    return {layer.name: weight_of(model, layer).T for layer in find_layers(model)}


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_every_layer_but_the_head_has_the_pattern_and_the_rest_is_as_it_was(folder, method):
    report = prune(folder, method, method=method)
    before, after = weights(folder / "model.onnx"), weights(folder / f"{method}.onnx")
    assert len(report.layers) == LAYERS
    for name, weight in after.items():
        if name in {layer.name for layer in report.layers}:
            assert ((weight.reshape(len(weight), -1, 4) == 0).sum(axis=2) >= 2).all()
        else:
            np.testing.assert_array_equal(weight, before[name])
    assert report.zeros == pytest.approx(0.5, abs=0.01)
    assert report.accuracy.kl > 0
    table = "embed_tokens"
    tables = [
        {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        for path in (folder / "model.onnx", folder / f"{method}.onnx")
    ]
    shared = [name for name in tables[0] if table in name and name in tables[1]]
    for name in shared:
        np.testing.assert_array_equal(tables[0][name], tables[1][name])


def test_the_perplexities_are_onnxruntimes_on_tokens_that_nothing_else_saw(folder):
    report = prune(folder, "seen")
    window = TOKENS[4 * 128 : 5 * 128].astype(np.int64)  # the last of five windows
    logits = Reference(folder / "seen.onnx").main(window).reshape(len(window), -1)[:-1]
    shifted = logits - logits.max(axis=1, keepdims=True)
    lost = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(127), window[1:]]
    assert report.accuracy.tokens == 127
    assert report.accuracy.ppl_after == pytest.approx(float(np.exp(lost.mean())), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"method": "dynamic", "bits": 8}])
def test_zeros_stay_zeros_when_the_file_is_quantized(folder, options):
    prune(folder, "first")
    slmtvm.quantize(folder / "first.onnx", folder / "then.onnx", **options)
    layers = [layer for layer in slmtvm.inspect(folder / "then.onnx").weights
              if layer.kind == "linear"]  # fmt: skip
    if options.get("bits") == 8:
        assert sum("2:4" in str(layer) for layer in layers) == LAYERS
        return
    model, was = onnx.load(folder / "then.onnx"), onnx.load(folder / "first.onnx")
    normalise(was)
    for layer in find_layers(was):
        zeros = weight_of(was, layer) == 0
        found = quantized_weight(model, layer)
        assert found is not None
        assert (found[zeros] == 0).all()


def test_layers_that_lose_most_stay_dense_within_the_part_that_may(folder):
    whole = prune(folder, "whole")
    report = prune(folder, "some", keep_dense=0.2)
    dense = {layer.name for layer in report.layers if layer.dense}
    sizes = {layer.name: layer.shape[0] * layer.shape[1] for layer in report.layers}
    assert 0 < sum(sizes[name] for name in dense) <= 0.2 * sum(sizes.values())
    losses = {layer.name: layer.output_error for layer in whole.layers}
    assert max(losses, key=lambda name: losses[name]) in dense
    before, after = weights(folder / "model.onnx"), weights(folder / "some.onnx")
    for name in dense:
        np.testing.assert_array_equal(before[name], after[name])
    assert report.accuracy.kl < whole.accuracy.kl


@pytest.mark.slow
def test_a_budget_leaves_the_fewest_of_those_that_lose_most_dense(folder):
    whole = prune(folder, "whole", method="magnitude", sparsity=0.7, pattern="free")
    before, worst = whole.accuracy.ppl_before, whole.accuracy.ppl_after / whole.accuracy.ppl_before
    budget = 1 + (worst - 1) / 3
    report = prune(
        folder, "within", method="magnitude", sparsity=0.7, pattern="free", budget=budget
    )
    assert report.accuracy.ppl_before == before
    assert report.accuracy.ppl_after <= budget * before
    losses = sorted(whole.layers, key=lambda layer: layer.output_error, reverse=True)
    dense = [layer.name for layer in report.layers if layer.dense]
    assert 0 < len(dense) < LAYERS
    assert set(dense) == {layer.name for layer in losses[: len(dense)]}
    # One fewer, as it is left out here by name, costs more than the budget.
    fewer = prune(
        folder, "fewer", method="magnitude", sparsity=0.7, pattern="free",
        exclude=[layer.name for layer in losses[: len(dense) - 1]],
    )  # fmt: skip
    assert fewer.accuracy.ppl_after > budget * before
    model = weights(folder / "within.onnx")
    assert all((weight == 0).mean() < 0.05 for name, weight in model.items() if name in dense)
    with pytest.raises(SlmError, match="pruning any layer makes the perplexity more than 1 times"):
        prune(folder, "none", method="magnitude", sparsity=0.99, pattern="free", budget=1.0)
    assert not (folder / "none.onnx").exists()


@pytest.mark.slow
def test_the_command_prints_the_table_and_what_it_costs(folder):
    result = command(
        "prune", folder / "model.onnx", "-o", folder / "out.onnx", "--pattern", "block:8x4",
        "--sparsity", "0.7", "--calibration", folder / "tokens.npy", "--json", folder / "out.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "PERPLEXITY" in result.stdout
    fields = json.loads((folder / "out.json").read_text())
    assert fields["zeros"] == pytest.approx(0.7, abs=0.05)
    assert len(fields["layers"]) == LAYERS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "guess"}, "there are sparsegpt, wanda, magnitude"),
        ({"calibration": None}, "needs a calibration text"),
        ({"keep_dense": 1.0}, "must be in"),
        ({"budget": 0.9}, "must be at least 1"),
        ({"budget": 1.1, "keep_dense": 0.1}, "leave --keep-dense out"),
        ({"budget": 1.1, "calibration": None, "method": "magnitude"}, "is of perplexity"),
        ({"exclude": ["*"]}, "no linear layer in float"),
    ],
)
def test_options_that_make_no_sense_are_refused_and_nothing_is_written(folder, options, message):
    options = {"calibration": folder / "tokens.npy", **options}
    with pytest.raises(SlmError, match=message):
        slmtvm.prune(folder / "model.onnx", folder / "not.onnx", **options)
    assert not (folder / "not.onnx").exists()


GROUPED = Tiny(hidden=40, heads=4, kv_heads=2, head_dim=12, ffn=48, vocab=97, layers=2, bias=True)


@pytest.mark.parametrize(
    ("structured", "sparsity", "inputs"), [("channels", 0.25, 36), ("heads", 0.5, 24)]
)
@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("int8", [False, True])
def test_what_is_pruned_as_a_whole_is_cut_out_though_it_was_quantized(
    structured, sparsity, inputs, method, int8, folder, tmp_path
):
    source, path = save(build(GROUPED), tmp_path), tmp_path / "pruned.onnx"
    report = slmtvm.prune(
        source, path, structured=structured, sparsity=sparsity, method=method,
        calibration=folder / "tokens.npy",
    )  # fmt: skip
    assert report.pattern == structured and len(report.layers) == 2
    assert all(layer.zeros == pytest.approx(sparsity) for layer in report.layers)
    if int8:
        quantize_dynamic(path, path)
    model = import_onnx(path, context=32)
    cut = [w for w in model.layers if w.shape == (40, inputs)]
    assert len(cut) == 2, [w.shape for w in model.layers]
    assert {spec.num_kv_heads for spec in model.kv} == {1 if structured == "heads" else 2}
    tokens = TOKENS[:1] if int8 else TOKENS[:20]
    want = run_onnxruntime(path, tokens)
    assert np.abs(evaluate(model, tokens) - want).max() <= 2e-4 * np.ptp(want)


def test_weights_that_stay_make_up_for_heads_that_go(folder, tmp_path):
    source = save(build(GROUPED), tmp_path)
    errors = [
        [
            layer.output_error
            for layer in slmtvm.prune(
                source, tmp_path / "pruned.onnx", structured="heads", method=method,
                calibration=folder / "tokens.npy",
            ).layers
        ]
        for method in ("sparsegpt", "wanda")
    ]  # fmt: skip
    assert all(a < b for a, b in zip(*errors, strict=True))


def test_structures_that_nothing_has_are_refused(folder):
    with pytest.raises(SlmError, match="there are heads, channels"):
        prune(folder, "no", structured="layers")
