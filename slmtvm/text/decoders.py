"""The decoder of a tokenizer.json as the text of each token.

What a token's text is may depend on whether it is the first one, and on nothing else, but for rows
of bytes and for spaces that are taken from the start of the whole text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from slmtvm.errors import UnsupportedTokenizerError
from slmtvm.text.models import byte_text

Settings = dict[str, Any]
_SPACE = " "
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What WordPiece's decoder tidies up, in this order.
_TIDY = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
         (" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"),
         (" 're", "'re"))  # fmt: skip


@dataclass
class Texts:
    """Of each token: its text at the start of a text, and after others."""

    first: list[bytes]
    other: list[bytes]
    is_byte: list[bool]  # one of a row of bytes, which is text where all of it is UTF-8
    space_after: list[bool]  # where another token follows
    stripped: str = ""  # a character that is taken from the start of the whole text
    stripped_count: int = 0  # at most as often


def token_texts(settings: Settings | None, names: list[str]) -> Texts:
    """The texts of the tokens ``names``; UnsupportedTokenizerError where not compiled."""
    if settings is None:
        return _texts(names, [_SPACE + name for name in names])
    parts = _parts(settings)
    kinds = [str(part.get("type")) for part in parts]
    if kinds == ["ByteLevel"]:
        raw = [name.encode() if (b := byte_text(name)) is None else b for name in names]
        return Texts(raw, raw, [False] * len(names), [False] * len(names))
    if kinds == ["BPEDecoder"]:
        return _suffixed(parts[0], names)
    made = _texts(names, names)
    fused = False
    for kind, part in zip(kinds, parts, strict=True):
        if kind not in ("Replace", "Strip", "Metaspace", "WordPiece", "ByteFallback", "Fuse"):
            raise UnsupportedTokenizerError(f"the decoder {' with '.join(kinds)} is not compiled")
        if kind == "Fuse":
            fused = True
        elif fused:
            _strip_all(part, made)
        elif kind == "ByteFallback":
            _fall_back(made)
        elif any(made.is_byte):
            raise UnsupportedTokenizerError(f"the decoder {kind} behind ByteFallback")
        else:
            _each(kind, part, made)
    return made


def _parts(settings: Settings) -> list[Settings]:
    if settings.get("type") == "Sequence":
        return [part for inner in settings["decoders"] for part in _parts(inner)]
    return [settings]


def _texts(first: list[str], other: list[str]) -> Texts:
    none = [False] * len(first)
    return Texts([t.encode() for t in first], [t.encode() for t in other], none, list(none))


def _each(kind: str, part: Settings, made: Texts) -> None:
    """A decoder that looks at one token at a time."""

    def changed(text: bytes, first: bool) -> bytes:
        return _decoded(kind, part, text.decode(), first).encode()

    made.first = [changed(text, first=True) for text in made.first]
    made.other = [changed(text, first=False) for text in made.other]


def _decoded(kind: str, part: Settings, text: str, first: bool) -> str:
    if kind == "Replace":
        pattern = part["pattern"]
        if "String" not in pattern:
            raise UnsupportedTokenizerError("the decoder Replace with a regex is not compiled")
        return text.replace(pattern["String"], part["content"])
    if kind == "Strip":
        return _stripped(text, part["content"], part["start"], part["stop"])
    if kind == "Metaspace":
        gone = first and part.get("prepend_scheme", "always") != "never"
        return text.replace(part["replacement"], "" if gone else _SPACE)
    if not first:
        prefix = part["prefix"]
        text = text.replace(prefix, "", 1) if text.startswith(prefix) else _SPACE + text
    if part["cleanup"]:
        for old, new in _TIDY:
            text = text.replace(old, new)
    return text


def _stripped(text: str, content: str, start: int, stop: int) -> str:
    begin, end = 0, len(text)
    while begin < min(start, len(text)) and text[begin] == content:
        begin += 1
    while len(text) - end < stop and end > 0 and text[end - 1] == content:
        end -= 1
    return text[begin : max(begin, end)]


def _strip_all(part: Settings, made: Texts) -> None:
    if part.get("type") != "Strip" or part["stop"] or made.stripped:
        raise UnsupportedTokenizerError(
            f"the decoder {part.get('type')} of the whole text is not compiled, but for spaces at "
            "its start"
        )
    made.stripped, made.stripped_count = part["content"], part["start"]


def _fall_back(made: Texts) -> None:
    for i, text in enumerate(made.other):
        if found := _BYTE.fullmatch(text.decode()):
            made.is_byte[i] = True
            made.first[i] = made.other[i] = bytes([int(found[1], 16)])


def _suffixed(part: Settings, names: list[str]) -> Texts:
    """Tokens that end a word have a suffix, which is a space where another token follows."""
    suffix = part["suffix"]
    if any(suffix in name.removesuffix(suffix) for name in names):
        raise UnsupportedTokenizerError(f"a token has {suffix!r} inside, which is not compiled")
    made = _texts(*[[name.removesuffix(suffix) for name in names]] * 2)
    made.space_after = [name.endswith(suffix) for name in names]
    return made
