"""Where a tokenizer is looked for, and what is refused before a model is compiled."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from slmtvm.compiler import compile_model
from slmtvm.errors import InvalidModelError
from slmtvm.generation import generation_tokens
from slmtvm.text import find_tokenizer, read_tokenizer
from tests.models import TOKENIZER


@pytest.mark.parametrize(
    ("model", "files", "found"),
    [
        ("model.onnx", ["tokenizer.json", "vocab.txt"], "tokenizer.json"),
        ("onnx/model.onnx", ["tokenizer.json"], "tokenizer.json"),
        ("onnx/model.onnx", ["onnx/vocab.txt", "tokenizer.json"], "onnx/vocab.txt"),
        ("other/model.onnx", ["tokenizer.json"], None),
        ("model.onnx", ["vocab.json"], None),
        ("model.onnx", ["vocab.json", "merges.txt"], "vocab.json"),
        ("model.onnx", ["spiece.model"], "spiece.model"),
        ("model.onnx", [], None),
    ],
)
def test_the_tokenizer_lies_beside_the_model_or_above_its_folder_onnx(
    tmp_path: Path, model: str, files: list[str], found: str | None
) -> None:
    (tmp_path / model).parent.mkdir(exist_ok=True)
    for name in files:
        (tmp_path / name).write_text("")
    assert find_tokenizer(tmp_path / model) == (tmp_path / found if found else None)


def test_a_model_named_from_its_own_folder_has_one_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "tokenizer.json").write_text("")
    monkeypatch.chdir(tmp_path / "onnx")
    assert find_tokenizer("model.onnx") == Path("../tokenizer.json")


def test_settings_lie_where_the_tokenizer_does(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "onnx" / "config.json").write_text('{"decoder_start_token_id": 3}')
    found = generation_tokens(tmp_path / "onnx" / "model.onnx", 100)
    assert (found.start, found.end) == (3, (7,))


def test_a_tokenizer_json_is_taken_as_it_is() -> None:
    assert read_tokenizer(TOKENIZER) == TOKENIZER.read_bytes()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_other(path: Path) -> None:
    path.write_text(json.dumps({"model_type": "bert"}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_pipe, "is a named pipe, not a file"),
        (make_device, "is a device, not a file"),
        (make_other, "not a tokenizer.json: "),
        (Path.mkdir, "holds no tokenizer: no tokenizer.json, vocab.txt, "),
        (lambda path: None, "no such file"),
    ],
)
def test_what_is_no_tokenizer_is_refused_before_the_model_is_read(
    tmp_path: Path, make: object, message: str
) -> None:
    path = tmp_path / "tok"
    make(path)  # type: ignore[operator]
    with pytest.raises(InvalidModelError, match=f"tok: {message}"):
        compile_model(tmp_path / "none.onnx", output=tmp_path / "x.slm", tokenizer=path)
