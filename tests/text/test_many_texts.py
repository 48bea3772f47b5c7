"""Long texts, and a million of all of Unicode and bytes, have the tokens of `tokenizers`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.models import HELDOUT
from tests.text.agreement import (
    any_character,
    assert_equal_texts,
    assert_equal_tokens,
    in_characters,
    random_texts,
)
from tests.text.kinds import KINDS, SPECIALS, make
from tests.text.library import compiled

MILLION = 1_000_000
LONG_TEXTS = 1500  # that are joined: some 50 kB
LINE_BYTES = 1_000_000
TOGETHER = 1000  # texts that the package takes at a time
TEXTS_EACH_STREAMED = 10


def long_text(seed: int) -> str:
    """Words that come again, and again in other surroundings, and odd pieces."""
    source = random.Random(seed)
    words = HELDOUT.read_bytes().decode()[:20_000].split(" ")
    odd = random_texts(LONG_TEXTS, seed, SPECIALS)
    return "".join(" ".join([text, *source.choices(words, k=4)]) for text in odd)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama 3", "llama 2", "affixes", "whole words", "bert"])
def test_a_long_text_has_the_same_tokens_at_the_same_places(name: str, tmp_path: Path) -> None:
    theirs = make(name)
    with compiled(theirs, tmp_path) as ours:
        assert_equal_tokens(ours, theirs, long_text(1))


def any_texts(seed: int) -> Iterator[str | bytes]:
    """Odd pieces, characters of all of Unicode, bytes of any kind, tokens inside words."""
    source = random.Random(seed)
    pieces = random_texts(MILLION, seed, SPECIALS)
    while True:
        kind = source.random()
        if kind < 0.5:
            yield next(pieces)
        elif kind < 0.7:
            yield "".join(any_character(source) for _ in range(source.randrange(1, 40)))
        elif kind < 0.8:
            word = next(pieces).replace(" ", "")
            at = source.randrange(len(word) + 1)
            yield word[:at] + source.choice(SPECIALS) + word[at:]
        elif kind < 0.9:
            yield source.randbytes(source.randrange(1, 40))
        else:  # characters, of which some lose or gain a byte
            whole = bytearray(next(pieces).encode())
            for _ in range(source.randrange(1, 4)):
                at = source.randrange(len(whole) + 1)
                whole[at : at + source.randrange(2)] = source.randbytes(source.randrange(2))
            yield bytes(whole) or b"\xff"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("normalized", [False, True])
def test_a_million_texts_have_the_same_tokens(name: str, normalized: bool, tmp_path: Path) -> None:
    theirs = make(name, normalized=normalized)
    texts = any_texts(2 * list(KINDS).index(name) + normalized)
    left = MILLION // (2 * len(KINDS)) + 1
    with compiled(theirs, tmp_path) as ours:
        while left > 0:
            given = list(islice(texts, TOGETHER))
            left -= len(given)
            # Bytes that are no character are U+FFFD each, as Python reads them.
            read = [t if isinstance(t, str) else t.decode(errors="replace") for t in given]
            for i, (text, expected) in enumerate(
                zip(given, theirs.encode_batch(read), strict=True)
            ):
                found = ours.encode(text)
                assert found.ids == expected.ids, repr(text)
                if isinstance(text, str):
                    assert in_characters(text, found.spans) == expected.offsets, repr(text)
                if i % TEXTS_EACH_STREAMED == 0:
                    assert_equal_texts(ours, theirs, found.ids)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KINDS)
def test_a_line_of_a_megabyte_has_the_same_tokens(name: str, tmp_path: Path) -> None:
    theirs = make(name)
    source = random.Random(7)
    lines = [
        "".join(c for c in long_text(2) * 20 if c not in "\r\n"),
        "".join(any_character(source) for _ in range(LINE_BYTES // 3)),
        "".join(source.choices("abcdefghijk", k=LINE_BYTES // 4)),  # one word
    ]
    with compiled(theirs, tmp_path) as ours:
        for line in lines:
            assert_equal_tokens(ours, theirs, line[:LINE_BYTES])
