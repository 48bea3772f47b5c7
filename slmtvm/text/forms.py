"""Unicode's normalization forms, as the `tokenizers` package computes them, as tables."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from functools import cache

from slmtvm.text.characters import asked_characters, mapped_characters
from slmtvm.text.steps import Normalize

_HANGUL = range(0xAC00, 0xD7A4)  # syllables, which follow a rule
_ABOVE, _OVERLAY = "\u0301", "\u0334"  # marks of the classes 230 and 1
_SEPARATOR = "\n"

Form = Callable[[str], str]


@cache
def normalization_form(name: str) -> Normalize:
    """The form NFC, NFD, NFKC or NFKD."""
    decomposed = _form("NFKD" if "K" in name else "NFD")
    strings = mapped_characters(decomposed)
    return Normalize(
        {c: s for c, s in strings.items() if c not in _HANGUL},
        combining_classes(),
        compositions() if name.endswith("C") else None,
    )


def _form(name: str) -> Form:
    from tokenizers import normalizers

    normalize: Form = getattr(normalizers, name)().normalize_str
    return normalize


def _each(normalize: Form, texts: Iterable[str]) -> list[str]:
    """``normalize`` of short texts, which hold no line ends."""
    return normalize(_SEPARATOR.join(texts)).split(_SEPARATOR)


@cache
def combining_classes() -> dict[int, int]:
    """The classes of all marks that are not 0: found by how they are put in order with others."""
    form = _form("NFD")
    apart = mapped_characters(form)
    plain = [c for c in asked_characters() if ord(c) not in apart and c not in "\r\n"]
    before = _each(form, (_ABOVE + c for c in plain))
    after = _each(form, (c + _OVERLAY for c in plain))
    marks = [
        c for c, b, a in zip(plain, before, after, strict=True)
        if b != _ABOVE + c or a != c + _OVERLAY
    ]  # fmt: skip
    known = {unicodedata.combining(c): c for c in reversed(marks) if unicodedata.combining(c)}
    known[unicodedata.combining(_OVERLAY)] = _OVERLAY
    # Classes that are not above a mark's own: a mark of such a class would have come first.
    found: dict[int, int] = {ord(_OVERLAY): unicodedata.combining(_OVERLAY)}
    for class_, sample in sorted(known.items()):
        texts = _each(form, (c + sample for c in marks))
        for c, text in zip(marks, texts, strict=True):
            if text != c + sample or class_ == 1:
                found[ord(c)] = max(found.get(ord(c), 0), class_ + (text != c + sample))
    # What is above one class and not above the next is of the next.
    classes = sorted(known)
    return {c: next((k for k in classes if k >= value), value) for c, value in found.items()}


@cache
def compositions() -> dict[tuple[int, int], int]:
    """Two characters to the one that NFC makes of them."""
    composed, apart = _form("NFC"), mapped_characters(_form("NFD"))
    single = [c for c in apart if c not in _HANGUL]
    kept = _each(composed, map(chr, single))
    found: dict[tuple[int, int], int] = {}
    for code, text in zip(single, kept, strict=True):
        if text == chr(code):
            parts = apart[code]
            first = composed(parts[:-1])
            if len(first) == 1:
                found[ord(first), ord(parts[-1])] = code
    return found
