"""Every output is compared by what it is for, and a difference in any of them is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmtvm.compiler import compile_model
from slmtvm.errors import AccuracyError
from slmtvm.importer import import_onnx
from slmtvm.ir.reference import evaluate_outputs
from slmtvm.verify import Limits, Reference, compare, verify
from slmtvm.verify.outputs import OutputsReport
from tests.importer.heads import DECODERS, ENCODERS, Head, save_head
from tests.models.corpus import corpus_path

BOUNDS = Limits(max_kl=1e-6, min_cosine=0.99999)


class Imported:
    """The reference evaluator on an imported model behind a session's interface; ``distort`` is
    applied to the output of that name."""

    def __init__(self, path: Path, distort: str = "", mask: str = "none") -> None:
        self._model = import_onnx(path, mask=mask)
        self._distort = distort
        model = self._model
        self.info: dict[str, Any] = {
            "kind": model.kind, "context": model.context, "vocab_size": model.vocab_size,
            "mask": model.mask, "padding": model.padding, "segments": model.segments,
            "outputs": [
                {"name": o.name, "features": o.features, "pooled": o.pooled} for o in model.outputs
            ],
        }  # fmt: skip

    def reset(self) -> None:
        pass

    def outputs(
        self, tokens: np.ndarray, mask: np.ndarray | None, segments: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        found = {}
        values = evaluate_outputs(self._model, tokens, mask=mask, segments=segments)
        for output, value in zip(self._model.outputs, values, strict=True):
            row = value if self._model.kind == "encoder" else value[-1]
            noise = np.random.default_rng(0).normal(size=row.shape) * (output.name == self._distort)
            found[output.name] = (row + noise).astype(np.float32)
        return found


def _every_head() -> dict[str, Head]:
    return {**ENCODERS, **{f"{name} of a decoder": head for name, head in DECODERS.items()}}


@pytest.mark.parametrize("name", _every_head())
def test_the_same_outputs_agree_and_a_distorted_one_does_not(name: str, tmp_path: Path) -> None:
    head = _every_head()[name]
    path = save_head(head, tmp_path, types="table")
    report = compare(Imported(path), Reference(path))
    assert isinstance(report, OutputsReport)
    assert report.agrees(BOUNDS)
    assert list(report.to_json()["outputs"]) == list(head.outputs)
    for output in head.outputs:
        assert output in str(report)
        assert not compare(Imported(path, output), Reference(path)).agrees(BOUNDS)


def test_scores_are_compared_by_probabilities_and_rows_by_their_cosine(tmp_path: Path) -> None:
    measures = {}
    for name in ("classifier", "tokens_and_embedding", "span", "regression"):
        folder = tmp_path / name
        folder.mkdir()
        path = save_head(ENCODERS[name], folder)
        said = compare(Imported(path), Reference(path)).to_json()["outputs"]
        for key, value in said.items():
            measures[f"{name}.{key}"] = "kl_mean" if "kl_mean" in value else "cosine"
    assert measures == {
        "classifier.logits": "kl_mean", "regression.logits": "cosine",
        "span.start_logits": "kl_mean", "span.end_logits": "kl_mean",
        "tokens_and_embedding.token_embeddings": "cosine",
        "tokens_and_embedding.sentence_embedding": "cosine",
    }  # fmt: skip


def test_a_bundle_that_takes_masks_is_compared_under_some(tmp_path: Path) -> None:
    path = save_head(ENCODERS["mean_embedding"], tmp_path)
    report = compare(Imported(path, mask="arbitrary"), Reference(path))
    assert report.masked and "under masks" in str(report)
    assert report.to_json()["masked"]["sentence_embedding"]["cosine"] > 0.99999


def test_a_bundle_of_another_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    path = save_head(ENCODERS["classifier"], tmp_path)
    other = save_head(ENCODERS["regression"], tmp_path / "other")
    with pytest.raises(AccuracyError, match="compiled from another file"):
        compare(Imported(path), Reference(other))


@pytest.mark.slow
def test_a_compiled_bundle_agrees_in_every_output(tmp_path: Path) -> None:
    path = save_head(ENCODERS["pooler"], tmp_path, types="table")
    compile_model(path, output=tmp_path / "x.slm", mask="arbitrary")
    assert verify(tmp_path / "x.slm", path).agrees(BOUNDS)


@pytest.mark.parametrize("distort", ["", "logits"])
def test_what_is_pooled_of_the_first_row_is_that_of_the_first_token_behind_padding(
    distort: str,
) -> None:
    path = corpus_path("roberta-optimum-sequence")
    session = Imported(path, distort, "arbitrary")
    assert session.info["mask"] == "skip"
    report = compare(session, Reference(path))
    assert isinstance(report, OutputsReport) and report.masked
    under = report.masked[0].excess(BOUNDS)
    assert bool(under) == bool(distort), under
