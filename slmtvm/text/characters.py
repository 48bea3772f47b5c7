"""What the `tokenizers` package knows of Unicode, asked of it: its versions of the tables differ
from Python's, and from each other's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt

from slmtvm.errors import UnsupportedTokenizerError

CODE_POINTS = 0x110000
_SURROGATES = slice(0xD800, 0xE000)
# Elsewhere no version of Unicode has characters: of each block there the first code point is asked,
# and stands for the others.
_ASSIGNED = (slice(0, 0x34000), slice(0xE0000, 0xE1000))
_BLOCK = 0x800
_LAST_OF_PLANE = 2  # of each plane: they are no characters anywhere
_SEPARATOR = "\n"
# White_Space of Unicode's PropList.txt, which has been the same since version 6.3.
_WHITE_SPACE = (*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028,
                0x2029, 0x202F, 0x205F, 0x3000)  # fmt: skip

CharSet = npt.NDArray[np.bool_]  # (CODE_POINTS,)


@cache
def stands_for() -> npt.NDArray[np.int64]:
    """(CODE_POINTS,): the code point that is asked in the place of each."""
    codes = np.arange(CODE_POINTS)
    blocks = codes // _BLOCK * _BLOCK
    asked = codes % 0x10000 >= 0x10000 - _LAST_OF_PLANE
    for part in _ASSIGNED:
        asked[part] = True
    return np.where(asked, codes, blocks)


@cache
def asked_codes() -> npt.NDArray[np.int64]:
    """The code points that are asked, in their order."""
    return np.flatnonzero(stands_for() == np.arange(CODE_POINTS))


@cache
def asked_characters() -> str:
    """Every character that is asked, in the order of their code points."""
    codes = asked_codes()
    lone = (codes >= _SURROGATES.start) & (codes < _SURROGATES.stop)
    return codes[~lone].astype("<u4").tobytes().decode("utf-32-le")


def code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


@lru_cache(maxsize=64)
def regex_class(pattern: str) -> CharSet:
    """The characters that ``pattern``, which matches single ones, matches in Oniguruma's syntax."""
    from tokenizers import Regex, normalizers

    if len(pattern) == 1 and (pattern.isalnum() or ord(pattern) > 127):
        return _set_of([ord(pattern)])
    if len(pattern) == 2 and pattern[0] == "\\" and not pattern[1].isalnum():
        return _set_of([ord(pattern[1])])
    try:
        replace = normalizers.Replace(Regex(pattern), "")
    except Exception as error:  # the tokenizers package raises plain Exception
        raise UnsupportedTokenizerError(f"the regex {pattern!r} is none: {error}") from error
    kept = replace.normalize_str(asked_characters())
    chosen = np.zeros(CODE_POINTS, bool)
    chosen[code_points(asked_characters())] = True
    chosen[code_points(kept)] = False
    return chosen[stands_for()]


def _set_of(codes: Iterable[int]) -> CharSet:
    chosen = np.zeros(CODE_POINTS, bool)
    chosen[list(codes)] = True
    return chosen


@cache
def white_space() -> CharSet:
    """What Rust calls white space."""
    return _set_of(_WHITE_SPACE)


@cache
def word_characters() -> CharSet:
    r"""``\w`` of Rust's regexes: a letter and one of them stay together."""
    from tokenizers import pre_tokenizers

    spaces = white_space()
    others = [c for c in asked_characters() if not spaces[ord(c)]]
    pieces = pre_tokenizers.Whitespace().pre_tokenize_str(" ".join(f"a{c}" for c in others))
    joined = "".join(piece[1] for piece, _ in pieces if len(piece) == 2 and piece[0] == "a")
    return _set_of(code_points(joined))[stands_for()]


def isolated_characters(split: Callable[[str], list[tuple[str, tuple[int, int]]]]) -> CharSet:
    """The characters that ``split``, a pre-tokenizer's function, takes away or puts apart.

    Asked between two letters, so that what stays with them is one piece.
    """
    everything = asked_characters()
    pieces = split("a" + "a".join(everything) + "a")
    kept = np.zeros(2 * len(everything) + 1, bool)
    for _, (begin, end) in pieces:
        kept[begin:end] = end - begin > 1
    return _set_of(code_points(everything)[~kept[1::2]])[stands_for()]


def mapped_characters(normalize: Callable[[str], str]) -> dict[int, str]:
    """The characters that ``normalize`` changes where they stand alone, and what they become."""
    asked = [c for c in asked_characters() if c != _SEPARATOR]
    lines = normalize(_SEPARATOR.join(asked)).split(_SEPARATOR)
    if len(lines) != len(asked):  # what ends lines is changed too: one by one
        lines = [normalize(c) for c in asked]
    found = {ord(c): line for c, line in zip(asked, lines, strict=True) if c != line}
    if (alone := normalize(_SEPARATOR)) != _SEPARATOR:
        found[ord(_SEPARATOR)] = alone
    gone = _set_of(code for code, line in found.items() if not line)[stands_for()]
    return {**found, **dict.fromkeys(np.flatnonzero(gone).tolist(), "")}
