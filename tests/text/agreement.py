"""Comparing a compiled tokenizer with the `tokenizers` package, whose file it was made of."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer

from slmtvm.runtime.tokenizer import CompiledTokenizer

# What regexes, normalizers and decoders treat in ways of their own.
PIECES = (
    "a", "b", "the", "The", "QUICK", "running", "ing", "s", "x", "don't", "'s", "'LL",
    "'\u017f", "n't",
    " ", " ", "  ", "   ", "\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "\u2028", "\x85",
    "▁", "Ġ",
    "1", "23", "456", "7890", "٣", "²", "½", "Ⅷ", "é", "e\u0301", "É", "ñ", "ß", "ẞ", "İ", "ﬁ", "Å",
    "Å", "ὰ\u0345", "か\u3099", "가", "각", "\u1100\u1161\u11a8", "日本語", "𠮷", "🐍",
    "👩\u200d👩\u200d👧", "🇩🇪", "\u200d", "\ufeff", "\u0301", "\u0323\u0307", "\x00", "\x01",
    "\ufffd",
    "!", "?!", ".", ",", "-", "_", "__init__", "(", ")", "[MASK]", "<", "</s>", "<s>", "<unk>",
    "[UNK]", "##s", "\u2019", "«", "¿", "€", "+", "=", "http://a.b/c?d=1&e", "def f(x):\n    ",
)  # fmt: skip


def random_texts(count: int, seed: int, specials: Sequence[str] = ()) -> Iterator[str]:
    """Texts of odd pieces, any characters of Unicode and special tokens, some inside words."""
    source = random.Random(seed)
    pieces = (*PIECES, *specials, *specials)
    for _ in range(count):
        yield "".join(
            source.choice(pieces) if source.random() < 0.9 else any_character(source)
            for _ in range(source.randrange(1, 16))
        )


def any_character(source: random.Random) -> str:
    """Of a plane that has characters, or of any."""
    while True:
        code = source.randrange(source.choice((0x300, 0x3000, 0x10000, 0x20000, 0x110000)))
        if not 0xD800 <= code < 0xE000:
            return chr(code)


def in_characters(text: str, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of bytes as spans of characters."""
    places, at = {}, 0
    for number, character in enumerate(text):
        places[at] = number
        at += len(character.encode())
    places[at] = len(text)
    return [(places[begin], places[end]) for begin, end in spans]


def assert_equal_tokens(
    ours: CompiledTokenizer, theirs: Tokenizer, text: str, *, spans: bool = True
) -> list[int]:
    """Ids and the places of tokens are those of the package; the ids."""
    expected = theirs.encode(text)
    found = ours.encode(text)
    assert found.ids == expected.ids, repr(text)
    if spans:
        assert in_characters(text, found.spans) == expected.offsets, repr(text)
    return found.ids


def assert_equal_texts(ours: CompiledTokenizer, theirs: Tokenizer, ids: list[int]) -> None:
    """Decoded at once and streamed, ``ids`` give the package's text."""
    for keep in (False, True):
        expected = theirs.decode(ids, skip_special_tokens=not keep)
        assert ours.decode(ids, keep_special=keep) == expected, ids
        assert "".join(ours.stream(ids, keep_special=keep)) == expected, ids
