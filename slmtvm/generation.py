"""Where a model's texts start and end: what the settings beside its ONNX file say of it.

An ONNX file has no place for it. Exporters put it into JSON files of the same folder, or of the one
above a folder "onnx".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmtvm.errors import InvalidModelError
from slmtvm.files import read_text
from slmtvm.text.find import model_folders

# The first file that has a field counts. genai_config.json nests its fields one level deeper.
_FILES = ("generation_config.json", "genai_config.json", "config.json")
_NESTED = "model"
_MAX_BYTES = 16 << 20  # settings have some kilobytes
_START, _END = "decoder_start_token_id", "eos_token_id"


@dataclass(frozen=True)
class GenerationTokens:
    """Ids of tokens: ``start`` begins an encoder-decoder's text, those of ``end`` end any text.

    None and () where the settings do not say.
    """

    start: int | None = None
    end: tuple[int, ...] = ()


def generation_tokens(model: str | Path, vocab_size: int) -> GenerationTokens:
    """What is said beside the ONNX file ``model``.

    Raises InvalidModelError, naming file and field, where it is no JSON, or no token of a
    vocabulary of ``vocab_size``.
    """
    start: list[int] = []
    end: list[int] = []
    paths = (folder / name for folder in model_folders(model) for name in _FILES)
    for path in paths:
        if path.is_file():
            fields = _fields(path)
            start = start or _ids(fields, _START, path, vocab_size)
            end = end or _ids(fields, _END, path, vocab_size)
    return GenerationTokens(start[0] if start else None, tuple(end))


def _fields(path: Path) -> dict[str, Any]:
    text = read_text(path, _MAX_BYTES, InvalidModelError)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidModelError(
            f"is no JSON: {error}; mend it, or take it out of the model's folder", where=str(path)
        ) from error
    if isinstance(fields, dict) and isinstance(fields.get(_NESTED), dict):
        fields = {**fields[_NESTED], **fields}
    return fields if isinstance(fields, dict) else {}


def _ids(fields: dict[str, Any], name: str, path: Path, vocab_size: int) -> list[int]:
    """The tokens of a field: one or a list; none where it is missing or null."""
    given = fields.get(name)
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise InvalidModelError(
                f"{name} is {given!r}; it must be tokens of a vocabulary of {vocab_size}: mend it, "
                "or take the file out of the model's folder",
                where=str(path),
            )
    return ids
