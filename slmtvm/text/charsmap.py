"""SentencePiece's precompiled normalization, as the `tokenizers` package follows it, as tables.

It is a double array (github.com/s-yata/darts-clone) of strings, each with the place of what it
becomes in the bytes that follow. The package looks up whole grapheme clusters of less than 6 bytes,
and single characters of others; what is found first, the shortest, takes the place of all.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from slmtvm.errors import UnsupportedTokenizerError
from slmtvm.text.characters import CODE_POINTS, asked_characters, stands_for
from slmtvm.text.steps import Charsmap

JOINS, PREPENDS, CONTROLS, PICTURES = 1, 2, 4, 8  # of SLM_STEP_CHARSMAP in text_charsmap.c
_JOINER, _ABOVE, _PICTURE = "\u200d", "\u0301", "\u2764"
_WORD = 4  # bytes

Edges = dict[tuple[int, int], tuple[int, int]]


def charsmap(encoded: str) -> Charsmap:
    """The step of a "precompiled_charsmap" in base 64; UnsupportedTokenizerError if it is none."""
    blob = base64.b64decode(encoded)
    size = int.from_bytes(blob[:_WORD], "little")
    units = np.frombuffer(blob[_WORD : _WORD + size], "<u4").astype(np.int64)
    if size < _WORD or len(units) * _WORD != size:
        raise UnsupportedTokenizerError("the precompiled charsmap is cut off")
    return _step(units, blob[_WORD + size :])


def _step(units: npt.NDArray[np.int64], texts: bytes) -> Charsmap:
    labels = units & ((1 << 31) | 0xFF)
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    leaves = (units >> 8) & 1 == 1
    edges: Edges = {}
    strings: dict[bytes, int] = {}
    longest = 1.0
    # Nodes are known by their bases: those that the array shares are one, met first by the shortest
    # way, which is the one that a text grows by most.
    nodes = {int(offsets[0]): 0}
    waiting = [(int(offsets[0]), 0)]  # bases and depths
    every_byte = np.arange(1, 256)
    for base, depth in waiting:  # grows meanwhile
        places = base ^ every_byte
        inside = places < len(units)
        found = every_byte[inside][labels[places[inside]] == every_byte[inside]]
        for byte in found.tolist():
            unit = base ^ byte
            below, number = unit ^ int(offsets[unit]), 0
            if leaves[unit]:
                at = int(units[below] & ((1 << 31) - 1))
                string = texts[at : texts.index(b"\0", at)]
                number = strings.setdefault(string, len(strings)) + 1
                longest = max(longest, len(string) / (depth + 1))
            if below not in nodes:
                nodes[below] = len(nodes)
                waiting.append((below, depth + 1))
            edges[nodes[base], byte] = (nodes[below], number)
    return Charsmap(edges, tuple(strings), cluster_kinds(), longest)


def _joins(asked: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Whether a character is one cluster with a letter before it.

    The package looks clusters up by a table of its own, newer than that of its regexes, which does
    not know the latest marks: a normalization of the letter takes what is joined to it away.
    """
    from tokenizers import normalizers

    letter, leaf = ord("a"), ord("b")
    units = np.zeros(256, "<u4")  # the root's children are at their bytes
    units[letter] = letter | 1 << 8 | (letter ^ leaf) << 10
    units[leaf] = 1 << 31
    size = int(units.nbytes).to_bytes(_WORD, "little")
    gone = normalizers.Precompiled(size + units.tobytes() + b"x\0")
    text = gone.normalize_str("\n".join(f"a{c}" for c in asked))
    return np.array([line == "x" for line in text.split("\n")])


@cache
def cluster_kinds() -> npt.NDArray[np.uint16]:
    """(CODE_POINTS,): how characters make grapheme clusters with others."""
    from tokenizers import Regex, normalizers

    clusters = normalizers.Replace(Regex(r"(?!\n)\X"), "x")
    asked = [c for c in asked_characters() if c not in "\r\n"]

    def alone(before: str, after: str) -> npt.NDArray[np.bool_]:
        """Whether a character is one cluster with what is around it."""
        text = clusters.normalize_str("\n".join(before + c + after for c in asked))
        return np.array([len(line) == 1 for line in text.split("\n")])

    joins = _joins(asked)
    kinds = np.zeros(CODE_POINTS, np.uint16)
    codes = np.array([ord(c) for c in asked])
    kinds[codes] = (
        JOINS * joins
        + PREPENDS * (alone("", "a") & ~joins)
        + CONTROLS * ~alone("", _ABOVE)
        + PICTURES * (alone(_PICTURE + _JOINER, "") & ~joins)
    )
    kinds[[ord("\r"), ord("\n")]] = CONTROLS
    return kinds[stands_for()]
