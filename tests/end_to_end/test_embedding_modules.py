"""Modules behind a sentence-transformer's graph become part of its bundle."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import slmtvm
from slmtvm.compiler import compile_model
from slmtvm.embedding_modules import embedding_modules
from slmtvm.errors import InvalidModelError
from slmtvm.importer import import_onnx
from slmtvm.ir.reference import evaluate_outputs
from slmtvm.runtime.tasks import pools_itself
from slmtvm.verify import Reference
from tests.importer.heads import CAUSAL_ROWS, DIM, ROWS, VOCAB, save_head, save_modules

TOKENS = np.random.default_rng(2).integers(2, VOCAB, 41)
FORMS = {
    "mean_tokens": "Dense:Tanh Normalize",
    "cls_token": "Dense:Identity Dense:GELU",
    "max_tokens": "LayerNorm Dense:ReLU Normalize",
    "lasttoken": "Dense:Sigmoid LayerNorm",
    "weightedmean_tokens": "Dense:Tanh Normalize",
}
# Of rows and their places in the sequence.
_POOLS = {
    "mean_tokens": lambda x, at: x.mean(axis=0),
    "cls_token": lambda x, at: x[0],
    "max_tokens": lambda x, at: x.max(axis=0),
    "lasttoken": lambda x, at: x[-1],
    "weightedmean_tokens": lambda x, at: (at + 1) @ x / (at + 1).sum(),
}


def _wanted(
    pooling: str, made: list[dict], rows: np.ndarray, visible: np.ndarray | None = None
) -> np.ndarray:
    """What sentence-transformers' modules compute, by their formulas."""
    at = np.arange(len(rows)) if visible is None else np.flatnonzero(visible)
    x = _POOLS[pooling](rows[at].astype(np.float64), at)
    for layer in made[1:]:
        if layer["kind"] == "Dense":
            x = layer["linear.weight"] @ x + layer["linear.bias"]
            erf = np.array([math.erf(v / math.sqrt(2)) for v in x])
            activations = {
                "Tanh": np.tanh(x), "Identity": x, "ReLU": np.maximum(x, 0),
                "GELU": x * (1 + erf) / 2, "Sigmoid": 1 / (1 + np.exp(-x)),
            }  # fmt: skip
            x = activations[layer["activation"]]
        elif layer["kind"] == "LayerNorm":
            x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * layer["norm.weight"] + layer["norm.bias"]
        else:
            x = x / np.linalg.norm(x)
    return np.asarray(x)


def _close(got: np.ndarray, want: np.ndarray) -> bool:
    return bool(np.abs(got - want).max() <= 2e-4 * max(np.ptp(want), np.abs(want).max()))


@pytest.mark.parametrize("pooling", FORMS)
def test_a_graphs_rows_go_through_the_modules_beside_it(pooling: str, tmp_path: Path) -> None:
    path = save_head(ROWS, tmp_path)
    made = save_modules(tmp_path, pooling, FORMS[pooling])
    model = import_onnx(path)
    assert [o.name for o in model.outputs] == ["token_embeddings", "sentence_embedding"]
    for count in (1, 20):
        rows, embedding = evaluate_outputs(model, TOKENS[:count])
        wanted = Reference(path).run(TOKENS[:count], ["token_embeddings"])[0][0]
        assert _close(rows, wanted)
        assert _close(embedding, _wanted(pooling, made, wanted))
        theirs = Reference(path).run(TOKENS[:count], ["sentence_embedding"])[0][0]
        np.testing.assert_allclose(theirs, _wanted(pooling, made, wanted), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean_tokens", "weightedmean_tokens"])
def test_a_bundle_gives_the_embedding_and_verify_compares_it(pooling: str, tmp_path: Path) -> None:
    path = save_head(CAUSAL_ROWS, tmp_path)
    made = save_modules(tmp_path, pooling, FORMS[pooling])
    bundle = tmp_path / "x.slm"
    compile_model(path, output=bundle, mask="arbitrary")
    reference = Reference(path)
    with slmtvm.load(bundle) as session:
        assert pools_itself(session.info)
        assert session.info["task"]["missing"] == []
        for visible in (np.ones(41, bool), np.arange(41) < 30, np.arange(41) >= 6):
            got = session.outputs(TOKENS, visible)["sentence_embedding"]
            rows = reference.run(TOKENS, ["token_embeddings"], mask=visible)[0][0]
            assert _close(got, _wanted(pooling, made, rows, visible))
    report = slmtvm.verify(bundle, path)
    assert "sentence_embedding: cosine 1.000000" in str(report)


def test_modules_whose_weights_are_not_there_stay_outside(tmp_path: Path) -> None:
    path = save_head(ROWS, tmp_path)
    save_modules(tmp_path, "mean_tokens", "Dense:Tanh")
    (tmp_path / "2_Dense" / "model.safetensors").rename(tmp_path / "2_Dense" / "model.h5")
    assert embedding_modules(path).missing == ("Dense",)
    assert [o.name for o in import_onnx(path).outputs] == ["token_embeddings"]


def test_damaged_modules_are_named(tmp_path: Path) -> None:
    path = save_head(ROWS, tmp_path)
    save_modules(tmp_path, "mean_tokens", "Dense:Tanh")
    weights = tmp_path / "2_Dense" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:40])
    with pytest.raises(InvalidModelError, match=r"model.safetensors.*cannot be read"):
        import_onnx(path)
    weights.write_bytes(whole)
    other = tmp_path / "other"
    other.mkdir()
    save_modules(other, "mean_tokens", "Dense:Tanh Dense:Tanh")
    (other / "3_Dense" / "model.safetensors").replace(weights)
    with pytest.raises(InvalidModelError, match=rf"takes {DIM + 5} features, and gets {DIM}"):
        import_onnx(path)


@pytest.mark.slow
def test_weights_in_torchs_own_form_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="pip install '.[fixtures]'")
    path = save_head(ROWS, tmp_path)
    save_modules(tmp_path, "mean_tokens", "Dense:Tanh")
    (wanted,) = embedding_modules(path).layers
    weights = tmp_path / "2_Dense" / "model.safetensors"
    saved = {f"linear.{name}": torch.tensor(getattr(wanted, name)) for name in ("weight", "bias")}
    torch.save(saved, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    (found,) = embedding_modules(path).layers
    np.testing.assert_array_equal(found.weight, wanted.weight)
    np.testing.assert_array_equal(found.bias, wanted.bias)


def test_another_activation_is_left_to_the_user(tmp_path: Path) -> None:
    path = save_head(ROWS, tmp_path)
    save_modules(tmp_path, "mean_tokens", "Dense:Hardswish")
    assert embedding_modules(path).missing == ("Dense",)
    settings = tmp_path / "2_Dense" / "config.json"
    settings.write_text(json.dumps({"activation_function": "torch.nn.modules.linear.Identity"}))
    assert embedding_modules(path).compiled
