"""The demo model's tokenizer, compiled, gives what the `tokenizers` package gives."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer

from slmtvm.runtime.tokenizer import CompiledTokenizer
from tests.models import HELDOUT, TOKENIZER
from tests.text.agreement import (
    assert_equal_texts,
    assert_equal_tokens,
    random_texts,
)
from tests.text.library import compiled

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def theirs() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


@pytest.fixture(scope="module")
def ours(
    theirs: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CompiledTokenizer]:
    with compiled(theirs, tmp_path_factory.mktemp("demo")) as tokenizer:
        yield tokenizer


@pytest.mark.slow
def test_a_real_text_has_the_same_tokens(ours: CompiledTokenizer, theirs: Tokenizer) -> None:
    text = HELDOUT.read_bytes().decode()
    ids = assert_equal_tokens(ours, theirs, text)
    assert ours.decode(ids, keep_special=True) == text


@pytest.mark.slow
def test_random_texts_have_the_same_tokens(ours: CompiledTokenizer, theirs: Tokenizer) -> None:
    for text in ("", END, f"a{END}b", *random_texts(800, seed=0, specials=[END])):
        assert_equal_texts(ours, theirs, assert_equal_tokens(ours, theirs, text))


@pytest.mark.slow
def test_any_tokens_give_the_same_text_at_once_and_streamed(
    ours: CompiledTokenizer, theirs: Tokenizer
) -> None:
    source = random.Random(1)
    size = theirs.get_vocab_size()
    for _ in range(500):
        assert_equal_texts(ours, theirs, [source.randrange(size) for _ in range(8)])


def test_a_streamed_piece_is_never_changed_by_what_follows(ours: CompiledTokenizer) -> None:
    ids = ours.encode("naïve 🐍 日本語").ids
    shown = ""
    for piece in ours.stream(ids):
        shown += piece
        assert "\ufffd" not in piece
    assert shown == "naïve 🐍 日本語"


@pytest.mark.parametrize(
    "text", [b"\xff", b"a\xc3", b"\xe2\x82 x", b"\xed\xa0\x80", b"\xf0\x9f\x90b\x80", b"\xc0\xaf"]
)
def test_bytes_that_are_no_text_are_read_as_damaged_characters(
    ours: CompiledTokenizer, theirs: Tokenizer, text: bytes
) -> None:
    found = ours.encode(text)
    assert found.ids == theirs.encode(text.decode(errors="replace")).ids
    assert all(0 <= begin < end <= len(text) for begin, end in found.spans)


@pytest.mark.slow
def test_a_very_long_word_has_the_same_tokens(ours: CompiledTokenizer, theirs: Tokenizer) -> None:
    word = "".join(random.Random(2).choices("abcdefghij", k=400_000))
    assert ours.encode(word).ids == theirs.encode(word).ids


def test_a_token_is_named_as_the_vocabulary_names_it(
    ours: CompiledTokenizer, theirs: Tokenizer
) -> None:
    assert ours.size == theirs.get_vocab_size()
    for token in range(ours.size):
        assert ours.token_text(token).decode() == theirs.id_to_token(token)
