"""Vocabularies in files of their own, converted, tokenize as their kinds of models were trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from slmtvm.errors import InvalidModelError
from slmtvm.text import read_tokenizer

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "model", "run", "##s", ",", "The", "é"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["t h", "th e", "Ġ the", "r u", "ru n", "Ġ run", "Ġ 1"]
MERGED = ["".join(merge.split()) for merge in MERGES]


def converted(folder: Path) -> Tokenizer:
    return Tokenizer.from_str(read_tokenizer(folder).decode())


def wordpiece(folder: Path, config: dict[str, object], words: list[str] = BERT) -> Tokenizer:
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return converted(folder)


def bpe(folder: Path, config: dict[str, object], more: tuple[str, ...] = ()) -> Tokenizer:
    vocabulary = {token: id_ for id_, token in enumerate([*BYTES, *MERGED, *more])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return converted(folder)


def test_a_vocab_txt_is_read_as_bert_s(tmp_path: Path) -> None:
    tokenizer = wordpiece(tmp_path, {})
    encoding = tokenizer.encode("The model, runs [MASK] fast")
    assert encoding.tokens == [
        "[CLS]", "the", "model", ",", "run", "##s", "[MASK]", "[UNK]", "[SEP]",
    ]  # fmt: skip
    assert tokenizer.decode(encoding.ids) == "the model, runs"
    pair = tokenizer.encode("the", "run")
    assert pair.tokens == ["[CLS]", "the", "[SEP]", "run", "[SEP]"]
    assert pair.type_ids == [0, 0, 0, 1, 1]


def test_the_settings_say_whether_a_vocabulary_has_capitals(tmp_path: Path) -> None:
    assert wordpiece(tmp_path, {"do_lower_case": False}).encode("The é").tokens[1:-1] == [
        "The",
        "é",
    ]
    plain = wordpiece(tmp_path, {"do_lower_case": True}).encode("The é").tokens[1:-1]
    assert plain == ["the", "[UNK]"]  # the accent goes with the capital


def test_mpnet_has_other_special_tokens(tmp_path: Path) -> None:
    words = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>", "the", "run"]
    tokenizer = wordpiece(tmp_path, {"tokenizer_class": "MPNetTokenizer"}, words)
    assert tokenizer.encode("the", "run").tokens == [
        "<s>", "the", "</s>", "</s>", "run", "</s>",
    ]  # fmt: skip


def test_bytes_merge_as_in_gpt2(tmp_path: Path) -> None:
    tokenizer = bpe(tmp_path, {})
    encoding = tokenizer.encode("the run é")
    assert encoding.tokens == ["the", "Ġrun", "Ġ", "Ã", "©"]
    assert tokenizer.decode(encoding.ids) == "the run é"


def test_roberta_writes_start_and_end(tmp_path: Path) -> None:
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    tokenizer = bpe(tmp_path, {"tokenizer_class": "RobertaTokenizerFast"}, special)
    assert tokenizer.encode("the<mask>").tokens == ["<s>", "the", "<mask>", "</s>"]


def test_qwen_s_digits_stand_alone_and_its_added_tokens_have_their_ids(tmp_path: Path) -> None:
    added = {str(len(BYTES) + len(MERGED)): {"content": "<|im_start|>", "special": True}}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    tokenizer = bpe(tmp_path, config)
    assert tokenizer.encode("<|im_start|>the 12").tokens == ["<|im_start|>", "the", "Ġ", "1", "2"]


def test_the_model_s_settings_say_the_kind_where_no_others_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "esm"}')
    with pytest.raises(InvalidModelError, match=r"vocab\.txt: a vocabulary of esm, which is not"):
        wordpiece(tmp_path, {})
    (tmp_path / "config.json").write_text('{"model_type": "distilbert"}')
    assert wordpiece(tmp_path, {}).encode("the").tokens == ["[CLS]", "the", "[SEP]"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", "a\nb\n", r"vocab\.txt: lacks the unk_token '\[UNK\]'"),
        ("vocab.txt", b"\xff\xfe", r"vocab\.txt: is not UTF-8"),
        ("vocab.json", "[]", r"vocab\.json: must hold tokens and their ids"),
        ("vocab.json", '{"a": "b"}', r"vocab\.json: must hold tokens and their ids"),
        ("vocab.json", '{"a": 1', r"vocab\.json: is no JSON"),
        ("vocab.json", '{"a": 1}', r"vocab\.json: a vocabulary of an unknown kind"),
        ("merges.txt", "a b c\n", r"merges\.txt: line 1 must hold two tokens: 'a b c'"),
        ("merges.txt", "q zz\n", r"vocab\.json: does not fit merges.txt"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: is no JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9": {"content": "<x>"}}}',
         r"the added token '<x>' has the id 9, after the vocabulary comes 263"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    if name != "vocab.txt":
        bpe(tmp_path, {})
    data = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidModelError, match=message):
        converted(tmp_path)
