"""SentencePiece models, converted, give the ids that sentencepiece itself gave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from slmtvm.errors import InvalidModelError
from slmtvm.text import read_tokenizer

MODELS = Path(__file__).parents[1] / "models" / "sentencepiece"
EXPECTED = json.loads((MODELS / "expected.json").read_text())
LLAMA = {"tokenizer_class": "LlamaTokenizer"}


def converted(folder: Path, kind: str, config: dict[str, object]) -> Tokenizer:
    shutil.copyfile(MODELS / f"{kind}.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_str(read_tokenizer(folder).decode())


@pytest.mark.parametrize("kind", EXPECTED)
def test_ids_and_texts_are_those_of_sentencepiece(tmp_path: Path, kind: str) -> None:
    tokenizer = converted(tmp_path, kind, {**LLAMA, "add_bos_token": False})
    for case in EXPECTED[kind]:
        assert tokenizer.encode(case["text"]).ids == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_a_kind_s_texts_start_and_end_as_its_models_were_trained(tmp_path: Path) -> None:
    start, end = 1, 2
    ids = EXPECTED["bpe"][3]["ids"]
    text = EXPECTED["bpe"][3]["text"]
    assert converted(tmp_path, "bpe", LLAMA).encode(text).ids == [start, *ids]
    both = {**LLAMA, "add_eos_token": True}
    assert converted(tmp_path, "bpe", both).encode(text).ids == [start, *ids, end]
    t5 = converted(tmp_path, "bpe", {"tokenizer_class": "T5Tokenizer", "extra_ids": 3})
    assert t5.encode(f"{text}<extra_id_0>").ids == [*ids, 420 + 2, end]


@pytest.mark.parametrize("config", [{}, {"tokenizer_class": "XLMRobertaTokenizer"}])
def test_a_kind_that_is_not_converted_is_refused_with_what_to_do(
    tmp_path: Path, config: dict[str, object]
) -> None:
    message = r"tokenizer\.model: a vocabulary of .*not converted; write its tokenizer.json: trans"
    with pytest.raises(InvalidModelError, match=message):
        converted(tmp_path, "bpe", config)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 40, b"\x0a\x03abc", (MODELS / "bpe.model").read_bytes()[:-300]]
)
def test_what_is_no_sentencepiece_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(InvalidModelError, match=r"x\.model: not a SentencePiece model"):
        read_tokenizer(tmp_path / "x.model")
