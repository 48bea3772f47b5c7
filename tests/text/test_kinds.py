"""Compiled tokenizers of every kind give the tokens, their places and the texts of `tokenizers`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from slmtvm.errors import UnsupportedTokenizerError
from slmtvm.text import compile_tokenizer
from tests.text.agreement import assert_equal_texts, assert_equal_tokens, random_texts
from tests.text.kinds import KINDS, SPECIALS, make
from tests.text.library import compiled

FIRST = 7  # kinds that are tested without being asked for
TEXTS = 200


def _marked(name: str) -> object:
    first = name in list(KINDS)[:FIRST]
    return pytest.param(name, marks=[] if first else pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("name", [_marked(name) for name in KINDS])
def test_a_trained_tokenizer_gives_the_same(name: str, tmp_path: Path) -> None:
    _compare(make(name, normalized=len(name) % 2 == 0), TEXTS, tmp_path)


def _compare(theirs: Tokenizer, count: int, folder: Path) -> None:
    size = theirs.get_vocab_size()
    source = random.Random(count)
    with compiled(theirs, folder) as ours:
        for text in ("", *SPECIALS, *random_texts(count, seed=count, specials=SPECIALS)):
            assert_equal_texts(ours, theirs, assert_equal_tokens(ours, theirs, text))
            assert_equal_texts(ours, theirs, [source.randrange(size) for _ in range(6)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "roberta", "template", "bert's tokens"])
def test_pairs_have_the_same_tokens_and_segments(name: str, tmp_path: Path) -> None:
    theirs = make(name)
    texts = list(random_texts(100, seed=4, specials=SPECIALS))
    with compiled(theirs, tmp_path) as ours:
        for first, second in zip(texts, reversed(texts), strict=True):
            expected = theirs.encode(first, second)
            found = ours.encode(first, second)
            assert (found.ids, found.segments) == (expected.ids, expected.type_ids)
            plain = theirs.encode(first, second, add_special_tokens=False)
            assert ours.encode(first, second, special=False).ids == plain.ids


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a)\\1"}, "content": ""},
         r"the regex '\(a\)\\\\1' has '\\1', which is not compiled at character 3"),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "(?<=a)b"}, "content": ""},
         r"has the group '\(\?<=' at character 0"),
        ("pre_tokenizer", {"type": "UnicodeScripts"}, "the pre-tokenizer UnicodeScripts is not"),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "a*"}, "behavior": "Removed",
         "invert": False}, r"the regex 'a\*' matches where there is nothing"),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "a++ab"}, "behavior": "Removed",
         "invert": False}, r"the regex 'a\+\+ab' is possessive where it matters"),
        ("decoder", {"type": "CTC", "pad_token": "p", "word_delimiter_token": "|",
         "cleanup": True}, "the decoder CTC is not compiled"),
    ],
)  # fmt: skip
def test_what_is_not_compiled_is_named(field: str, value: object, message: str) -> None:
    import json

    settings = json.loads(make("bert").to_str())
    settings[field] = value
    with pytest.raises(UnsupportedTokenizerError, match=message):
        compile_tokenizer(json.dumps(settings).encode())


def test_the_same_tokenizer_gives_the_same_bytes() -> None:
    content = make("llama 2").to_str().encode()
    assert compile_tokenizer(content) == compile_tokenizer(content)
