"""The pre-tokenizers of a tokenizer.json as steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slmtvm.errors import UnsupportedTokenizerError
from slmtvm.text.automaton import ENDS_HERE, Automaton, compile_automaton
from slmtvm.text.characters import (
    CharSet,
    isolated_characters,
    white_space,
    word_characters,
)
from slmtvm.text.normalizers import pattern_tree
from slmtvm.text.regex import parse_regex
from slmtvm.text.steps import Behavior, Map, Prepend, Split, Step, When

Settings = dict[str, Any]

# What GPT-2 splits by (github.com/openai/gpt-2, encoder.py), which ByteLevel does by itself.
BYTE_LEVEL_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACE = " "


@dataclass
class PreTokenizer:
    steps: list[Step] = field(default_factory=list)
    in_bytes: bool = False  # the model's characters are bytes


def pre_tokenizer(settings: Settings | None) -> PreTokenizer:
    """What the field "pre_tokenizer" says; UnsupportedTokenizerError where one is not compiled."""
    made = PreTokenizer()
    for part in _parts(settings):
        if made.in_bytes:
            raise UnsupportedTokenizerError(
                f"the pre-tokenizer {part.get('type')} behind ByteLevel is not compiled"
            )
        kind = part.get("type")
        if kind not in _KINDS:
            raise UnsupportedTokenizerError(f"the pre-tokenizer {kind} is not compiled")
        made.steps += _KINDS[str(kind)](part)
        made.in_bytes = kind == "ByteLevel"
    return made


def _parts(settings: Settings | None) -> list[Settings]:
    if settings is None:
        return []
    if settings.get("type") == "Sequence":
        return [part for inner in settings["pretokenizers"] for part in _parts(inner)]
    return [settings]


def _byte_level(settings: Settings) -> list[Step]:
    steps: list[Step] = []
    if settings.get("add_prefix_space", True):
        steps.append(Prepend(_SPACE, When.UNLESS_SAME))
    if settings.get("use_regex", True):
        steps.append(_split_by(BYTE_LEVEL_WORDS, Behavior.ISOLATED))
    return steps


def _split_by(regex: str, behavior: Behavior, invert: bool = False) -> Split:
    return Split(compile_automaton(parse_regex(regex), regex), behavior, invert)


def _behavior(name: str) -> Behavior:
    for behavior in Behavior:
        if behavior.name.replace("_", "") == name.upper().replace("_", ""):
            return behavior
    raise UnsupportedTokenizerError(f"the split behavior {name!r} is not compiled")


def _split(settings: Settings) -> list[Step]:
    node, said = pattern_tree(settings["pattern"])
    behavior = _behavior(settings["behavior"])
    return [Split(compile_automaton(node, said), behavior, bool(settings.get("invert")))]


def single_characters(chosen: CharSet) -> Automaton:
    """Matches one character of the set at a time."""
    return _of_classes(chosen.astype(np.uint16), [[0, 0], [0, 2], [0, 0]], [0, 0, ENDS_HERE])


def _of_classes(classes: Any, transitions: list[list[int]], accepts: list[int]) -> Automaton:
    """Starts in state 1; nothing matches only because the text ends."""
    return Automaton(
        classes=classes,
        next=np.array(transitions, np.uint16),
        accepts=np.array(accepts, np.uint16),
        at_end=np.zeros(len(accepts), np.uint16),
        first_start=1,
        start=1,
    )


def _whitespace(_: Settings) -> list[Step]:
    r"""``\w+|[^\w\s]+``."""
    classes = np.where(white_space(), 0, np.where(word_characters(), 1, 2)).astype(np.uint16)
    rows = [[0, 0, 0], [0, 2, 3], [0, 2, 0], [0, 0, 3]]
    words = _of_classes(classes, rows, [0, 0, ENDS_HERE, ENDS_HERE])
    return [Split(words, Behavior.REMOVED, invert=True)]


def _whitespace_split(_: Settings) -> list[Step]:
    return [Split(single_characters(white_space()), Behavior.REMOVED)]


def _punctuation_marks() -> CharSet:
    from tokenizers import pre_tokenizers

    return isolated_characters(pre_tokenizers.Punctuation().pre_tokenize_str)


def _punctuation(settings: Settings) -> list[Step]:
    behavior = _behavior(settings.get("behavior", "Isolated"))
    return [Split(single_characters(_punctuation_marks()), behavior)]


def _digits(settings: Settings) -> list[Step]:
    from tokenizers import pre_tokenizers

    digits = isolated_characters(pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str)
    one_by_one = settings.get("individual_digits", False)
    behavior = Behavior.ISOLATED if one_by_one else Behavior.CONTIGUOUS
    return [Split(single_characters(digits), behavior)]


def _bert(_: Settings) -> list[Step]:
    marks = Split(single_characters(_punctuation_marks()), Behavior.ISOLATED)
    return [*_whitespace_split({}), marks]


def _delimiter(settings: Settings) -> list[Step]:
    pattern = {"String": settings["delimiter"]}
    node, said = pattern_tree(pattern)
    return [Split(compile_automaton(node, said), Behavior.REMOVED)]


def _metaspace(settings: Settings) -> list[Step]:
    mark = settings["replacement"]
    steps: list[Step] = [Map({ord(_SPACE): mark})]
    scheme = settings.get("prepend_scheme", "always")
    if scheme == "always":
        steps.append(Prepend(mark, When.UNLESS_SAME))
    elif scheme == "first":
        steps.append(Prepend(mark, When.FIRST))
    if settings.get("split", True):
        node, said = pattern_tree({"String": mark})
        steps.append(Split(compile_automaton(node, said), Behavior.MERGED_WITH_NEXT))
    return steps


_KINDS: dict[str, Callable[[Settings], list[Step]]] = {
    "BertPreTokenizer": _bert,
    "ByteLevel": _byte_level,
    "CharDelimiterSplit": _delimiter,
    "Digits": _digits,
    "Metaspace": _metaspace,
    "Punctuation": _punctuation,
    "Split": _split,
    "Whitespace": _whitespace,
    "WhitespaceSplit": _whitespace_split,
}
