"""What is done to a text before the model sees it: a list of steps, followed one after the other.

Each step is a table of tokenizer.bin; codegen/runtime/text.h names their kinds and choices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from slmtvm.text.automaton import Automaton
from slmtvm.text.tables import CODE_POINTS, TableWriter

_GROWTH_UNIT = 16  # growth is said in sixteenths


class Kind(IntEnum):
    ADDED = 1
    MAP = 2
    SPLIT = 3
    PREPEND = 4
    REPLACE = 5
    STRIP = 6
    NORMALIZE = 7
    CHARSMAP = 8


class Behavior(IntEnum):
    """What becomes of what a split finds."""

    REMOVED = 0
    ISOLATED = 1
    MERGED_WITH_PREVIOUS = 2
    MERGED_WITH_NEXT = 3
    CONTIGUOUS = 4


class When(IntEnum):
    """When a string is put in front of a text."""

    ALWAYS = 0
    UNLESS_SAME = 1  # it starts with the string
    FIRST = 2  # the same, and it is the start of the whole text


@dataclass(frozen=True)
class AddedToken:
    content: str  # as it is looked for: normalized where the text is
    id: int
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class Added:
    """Takes added tokens out: the longest of those that start first."""

    tokens: tuple[AddedToken, ...]


@dataclass(frozen=True)
class Map:
    """Characters, by code point, become strings; or, ``around``, get one before and one behind."""

    strings: dict[int, str] = field(hash=False)
    around: bool = False


@dataclass(frozen=True)
class Split:
    automaton: Automaton
    behavior: Behavior
    invert: bool = False


@dataclass(frozen=True)
class Prepend:
    string: str
    when: When


@dataclass(frozen=True)
class Replace:
    automaton: Automaton
    string: str
    growth: float  # most bytes that come out of one


@dataclass(frozen=True)
class Strip:
    left: bool
    right: bool


@dataclass(frozen=True)
class Normalize:
    """A normalization form of Unicode, but for Hangul syllables, which follow a rule."""

    decompositions: dict[int, str] = field(hash=False)
    classes: dict[int, int] = field(hash=False)  # of combining marks, 1 to 254
    compositions: dict[tuple[int, int], int] | None = field(hash=False)  # None: stays apart


@dataclass(frozen=True, eq=False)
class Charsmap:
    """SentencePiece's normalization; ``slmtvm.text.charsmap`` says what is followed."""

    edges: dict[tuple[int, int], tuple[int, int]]  # (node, byte) to (node, number of string + 1)
    strings: tuple[bytes, ...]
    kinds: npt.NDArray[np.uint16]  # of characters in grapheme clusters
    growth: float


Step = Added | Map | Split | Prepend | Replace | Strip | Normalize | Charsmap


def write_steps(steps: list[Step], writer: TableWriter) -> int:
    """The table of all ``steps``; a reference to it."""
    return writer.words([word for step in steps for word in _step(step, writer)])


def _step(step: Step, writer: TableWriter) -> list[int]:
    kind, choice, invert, growth, more = _head(step)
    pairs = map_ = strings = automaton = words = count = 0
    if isinstance(step, Added):
        pairs = writer.pairs(trie([(t.content.encode(), i) for i, t in enumerate(step.tokens)]))
        listed = _added_words(step)
        words, count = writer.words(listed), len(listed)
    elif isinstance(step, Map):
        map_, strings = _map(step, writer)
    elif isinstance(step, Normalize):
        map_, strings = _map(Map(step.decompositions), writer)
        classes = np.zeros(CODE_POINTS, np.uint16)
        classes[list(step.classes)] = list(step.classes.values())
        automaton = writer.char_map(classes)
        pairs = writer.pairs({k: (v, 0) for k, v in (step.compositions or {}).items()})
    elif isinstance(step, Charsmap):
        map_, strings = writer.char_map(step.kinds), writer.strings(step.strings)
        pairs = writer.pairs(step.edges)
    elif isinstance(step, Prepend):
        strings = writer.strings([step.string.encode()])
    elif isinstance(step, Split | Replace):
        automaton = writer.automaton(step.automaton)
        if isinstance(step, Replace):
            strings = writer.strings([step.string.encode()])
    return [kind, choice, invert, growth, more, pairs, map_, strings, automaton, words, count]


def _head(step: Step) -> tuple[int, int, int, int, int]:
    """Kind, choice, invert, growth in sixteenths (0: makes no other text), bytes besides."""
    if isinstance(step, Added):
        return Kind.ADDED, 0, 0, 0, 0
    if isinstance(step, Map):
        return Kind.MAP, int(step.around), 0, _sixteenths(_map_growth(step)), 0
    if isinstance(step, Normalize):
        # A Hangul syllable of 3 bytes becomes 9.
        growth = max(3.0, _map_growth(Map(step.decompositions)))
        return Kind.NORMALIZE, int(step.compositions is not None), 0, _sixteenths(growth), 0
    if isinstance(step, Charsmap):
        return Kind.CHARSMAP, 0, 0, _sixteenths(max(1.0, step.growth)), 0
    if isinstance(step, Split):
        return Kind.SPLIT, step.behavior, int(step.invert), 0, 0
    if isinstance(step, Prepend):
        return Kind.PREPEND, step.when, 0, _GROWTH_UNIT, len(step.string.encode())
    if isinstance(step, Replace):
        return Kind.REPLACE, 0, 0, _sixteenths(max(1.0, step.growth)), 0
    return Kind.STRIP, step.left + 2 * step.right, 0, 0, 0


def _sixteenths(growth: float) -> int:
    return int(np.ceil(growth * _GROWTH_UNIT))


def _map_growth(step: Map) -> float:
    def growth(character: bytes, string: bytes) -> float:
        return (2 * len(string) / len(character) + 1) if step.around else (
            len(string) / len(character)
        )  # fmt: skip

    return max([1.0, *(growth(chr(c).encode(), s.encode()) for c, s in step.strings.items())])


def _map(step: Map, writer: TableWriter) -> tuple[int, int]:
    """For each character the number of its string + 1, or 0; and the strings."""
    numbers = {s: n for n, s in enumerate(dict.fromkeys(step.strings.values()), 1)}
    values = np.zeros(CODE_POINTS, np.uint16)
    for code, string in step.strings.items():
        values[code] = numbers[string]
    return writer.char_map(values), writer.strings([s.encode() for s in numbers])


def _added_words(step: Added) -> list[int]:
    """A bit for each byte that a token starts with, then (id, how) of each."""
    first = [0] * 8
    for token in step.tokens:
        byte = token.content.encode()[0]
        first[byte // 32] |= 1 << byte % 32
    return first + [
        word for t in step.tokens for word in (t.id, t.single_word + 2 * t.lstrip + 4 * t.rstrip)
    ]


def trie(
    strings: list[tuple[bytes, int]],
    edges: dict[tuple[int, int], tuple[int, int]] | None = None,
    root: int = 0,
) -> dict[tuple[int, int], tuple[int, int]]:
    """(node, byte) to (node, number + 1 of the string that ends there, or 0).

    Added to ``edges`` where given, below ``root``, which no node there has. Of equal strings the
    last one counts.
    """
    edges = {} if edges is None else edges
    offset = root  # nodes are numbered by the edges that lead to them
    for string, number in strings:
        node = root
        for at, byte in enumerate(string):
            child, ends = edges.get((node, byte), (0, 0))
            if child == 0:
                child = offset + len(edges) + 1
            if at == len(string) - 1:
                ends = number + 1
            edges[node, byte] = (child, ends)
            node = child
    return edges
