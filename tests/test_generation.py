"""Where texts start and end, as the settings beside an ONNX file say it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmtvm.errors import InvalidModelError
from slmtvm.generation import GenerationTokens, generation_tokens


def _tokens(folder: Path, **files: object) -> GenerationTokens:
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return generation_tokens(folder / "model.onnx", 100)


def test_a_model_without_settings_says_nothing(tmp_path: Path) -> None:
    assert _tokens(tmp_path) == GenerationTokens()


def test_the_settings_for_generation_count_before_those_of_the_model(tmp_path: Path) -> None:
    config = {"decoder_start_token_id": 1, "eos_token_id": 7}
    generation = {"eos_token_id": [3, 5], "decoder_start_token_id": None}
    found = _tokens(tmp_path, config=config, generation_config=generation)
    assert found == GenerationTokens(1, (3, 5))


def test_a_model_builder_s_settings_are_one_level_deeper(tmp_path: Path) -> None:
    assert _tokens(tmp_path, genai_config={"model": {"eos_token_id": 9}}).end == (9,)


@pytest.mark.parametrize("wrong", ["2", 100, -1, True, [4, None]])
def test_what_is_no_token_is_refused_with_file_and_field(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(InvalidModelError, match=r"config.json: eos_token_id is .* of 100: mend"):
        _tokens(tmp_path, config={"eos_token_id": wrong})


def test_what_is_no_json_is_refused_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InvalidModelError, match=r"generation_config\.json: is no JSON: .*mend it"):
        generation_tokens(tmp_path / "model.onnx", 100)


@pytest.mark.parametrize("other", [[], {"model": "a name"}, "text", {"eos_token_id": None}])
def test_settings_of_something_else_say_nothing(tmp_path: Path, other: object) -> None:
    assert _tokens(tmp_path, config=other) == GenerationTokens()
