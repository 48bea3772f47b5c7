"""What is read beside a model about its labels and its pooling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slmtvm.errors import InvalidModelError
from slmtvm.task import TaskSettings, task_settings


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_nothing_beside_a_model_says_nothing(tmp_path: Path) -> None:
    assert task_settings(tmp_path / "model.onnx") == TaskSettings()


def test_labels_are_those_of_the_configuration_in_order(tmp_path: Path) -> None:
    labels = {"1": "fine", "0": "bad", "2": "good"}
    _write(tmp_path / "config.json", {"id2label": labels})
    assert task_settings(tmp_path / "model.onnx").labels == ("bad", "fine", "good")
    _write(
        tmp_path / "config.json",
        {"id2label": labels, "problem_type": "multi_label_classification"},
    )
    assert task_settings(tmp_path / "model.onnx").independent


@pytest.mark.parametrize("labels", [{"0": "a", "2": "c"}, {"0": 3}, {"a": "0"}])
def test_labels_that_are_none_are_an_error(labels: dict[str, Any], tmp_path: Path) -> None:
    _write(tmp_path / "config.json", {"id2label": labels})
    with pytest.raises(InvalidModelError, match=r"config.json.*id2label must name labels 0 to"):
        task_settings(tmp_path / "model.onnx")


def test_a_file_that_is_no_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(InvalidModelError, match=r"modules.json.*is no JSON"):
        task_settings(tmp_path / "model.onnx")


def _module(name: str, folder: str) -> dict[str, str]:
    return {"type": f"sentence_transformers.models.{name}", "path": folder}


@pytest.mark.parametrize(
    ("mode", "pooling"),
    [
        ("cls_token", "first"), ("mean_tokens", "mean"), ("max_tokens", "max"),
        ("lasttoken", "last"), ("weightedmean_tokens", "weightedmean"),
    ],
)  # fmt: skip
def test_the_pooling_of_a_sentence_transformer_is_read(
    mode: str, pooling: str, tmp_path: Path
) -> None:
    modules = [_module("Transformer", ""), _module("Pooling", "1_Pooling")]
    _write(tmp_path / "modules.json", [*modules, _module("Normalize", "2_Normalize")])
    fields = {"word_embedding_dimension": 8, "pooling_mode_max_tokens": False}
    _write(tmp_path / "1_Pooling" / "config.json", {**fields, f"pooling_mode_{mode}": True})
    (tmp_path / "onnx").mkdir()
    for model in (tmp_path / "model.onnx", tmp_path / "onnx" / "model.onnx"):
        found = task_settings(model)
        assert (found.pooling, found.normalize, found.missing) == (pooling, True, ())
    _write(tmp_path / "modules.json", [*modules, _module("Dense", "2_Dense")])
    assert task_settings(tmp_path / "model.onnx").missing == ("Dense",)
