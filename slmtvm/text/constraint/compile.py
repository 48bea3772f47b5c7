"""What may be written, as a regex, to the file that the C runtime follows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from slmtvm.errors import UnsupportedTokenizerError
from slmtvm.text.compiled import read_texts
from slmtvm.text.constraint.automaton import byte_automaton
from slmtvm.text.constraint.file import constraint_file
from slmtvm.text.constraint.token_tables import TokenTexts, token_tables
from slmtvm.text.decoders import Texts


@dataclass(frozen=True)
class CompiledConstraint:
    """The file's ``content``, and what it came to.

    ``least_tokens``: of the shortest text. ``ends``: tokens that may end one; without any, a text
    that may go on goes on to the limit of its tokens.
    """

    content: bytes
    states: int
    classes: int
    least_tokens: int
    ends: tuple[int, ...]


def compile_constraint(
    regex: str,
    tokenizer: bytes,
    *,
    vocab_size: int,
    ends: Iterable[int],
    first_texts: bool,
    source: bytes,
    said: str,
) -> CompiledConstraint:
    """Texts that ``regex`` (in Rust's syntax) matches as a whole, in tokens of tokenizer.json.

    ``ends``: tokens that end a text. ``first_texts``: a text is written from its start, as an
    encoder-decoder does, and follows no prompt. ``source``: what the file is to be known by.
    Raises ConstraintError, with ``said``, where the regex cannot be compiled; for a tokenizer that
    cannot, UnsupportedTokenizerError.
    """
    texts, skipped = read_texts(tokenizer)
    if any(texts.space_after):
        raise UnsupportedTokenizerError(
            "texts of this tokenizer depend on the token that follows (BPEDecoder), for which "
            "constraints are not compiled"
        )
    enders = tuple(sorted({end for end in ends if 0 <= end < vocab_size}))
    for end in enders:
        if end < len(skipped):
            skipped[end] = True
    tables = token_tables(
        byte_automaton(regex, said), _written(texts, skipped, vocab_size, first_texts), said
    )
    content = constraint_file(
        tables, enders, vocab_size, sha256(source).digest(), sha256(tokenizer).digest()
    )
    return CompiledConstraint(
        content, len(tables.rows), tables.class_count - 1, int(tables.left[0]), enders
    )


def _written(texts: Texts, skipped: list[bool], vocab_size: int, first_texts: bool) -> TokenTexts:
    """The texts of the tokens that are written; a vocabulary may be padded, or cut."""
    gone = texts.stripped.encode()

    def first(text: bytes) -> bytes:
        if gone and text.startswith(gone):
            for _ in range(texts.stripped_count):
                text = text.removeprefix(gone)
            return text if not text.startswith(gone) else b""
        return text

    def kept(all_: list[bytes]) -> list[bytes | None]:
        found = [None if skip else text for text, skip in zip(all_, skipped, strict=True)]
        return (found + [None] * vocab_size)[:vocab_size]

    other = kept(texts.other)
    return TokenTexts(kept([first(t) for t in texts.first]) if first_texts else other, other)
