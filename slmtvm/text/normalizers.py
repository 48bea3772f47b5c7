"""The normalizers of a tokenizer.json as steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from slmtvm.errors import UnsupportedTokenizerError
from slmtvm.text.automaton import compile_automaton
from slmtvm.text.characters import mapped_characters
from slmtvm.text.charsmap import charsmap
from slmtvm.text.forms import normalization_form
from slmtvm.text.regex import Choice, Node, Repeat, Sequence, literal, parse_regex
from slmtvm.text.steps import Map, Prepend, Replace, Step, Strip, When

Settings = dict[str, Any]


def normalizer_steps(settings: Settings | None) -> list[Step]:
    """The steps of the field "normalizer"; UnsupportedTokenizerError where one is not compiled."""
    if settings is None:
        return []
    kind = settings.get("type")
    if kind == "Sequence":
        return [step for part in settings["normalizers"] for step in normalizer_steps(part)]
    if kind not in _KINDS:
        raise UnsupportedTokenizerError(f"the normalizer {kind} is not compiled")
    return _KINDS[str(kind)](settings)


def pattern_tree(pattern: Settings) -> tuple[Node, str]:
    """What {"String": ...} or {"Regex": ...} finds, and how it is written."""
    if "Regex" in pattern:
        return parse_regex(pattern["Regex"]), pattern["Regex"]
    if pattern.get("String", "") == "":
        raise UnsupportedTokenizerError("an empty pattern is not compiled")
    return literal(pattern["String"]), pattern["String"]


def _least_characters(node: Node) -> int:
    if isinstance(node, Sequence):
        return sum(map(_least_characters, node.items))
    if isinstance(node, Choice):
        return min(map(_least_characters, node.options))
    if isinstance(node, Repeat):
        return node.least * _least_characters(node.item)
    return 1 if type(node).__name__ == "Chars" else 0


def _replace(settings: Settings) -> list[Step]:
    node, said = pattern_tree(settings["pattern"])
    growth = len(settings["content"].encode()) / max(1, _least_characters(node))
    return [Replace(compile_automaton(node, said), settings["content"], growth)]


def _asked(settings: Settings) -> list[Step]:
    """A normalizer that works on single characters: what becomes of each is asked of it."""
    return [Map(mapped_characters(reference_normalizer(settings)))]


def reference_normalizer(settings: Settings) -> Callable[[str], str]:
    """The normalizer of the `tokenizers` package."""
    from tokenizers import normalizers

    made = normalizers.Sequence([])
    state = json.dumps({"type": "Sequence", "normalizers": [settings]})
    made.__setstate__(state.encode())
    return made.normalize_str


def _prepend(settings: Settings) -> list[Step]:
    return [Prepend(settings["prepend"], When.ALWAYS)] if settings["prepend"] else []


def _strip(settings: Settings) -> list[Step]:
    return [Strip(settings["strip_left"], settings["strip_right"])]


def _form(settings: Settings) -> list[Step]:
    return [normalization_form(settings["type"])]


def _around(map_: Map) -> Map:
    """The same for strings that are all a space, the character and a space."""
    if any(string != f" {chr(code)} " for code, string in map_.strings.items()):
        raise UnsupportedTokenizerError("BertNormalizer puts other than spaces around characters")
    return Map(dict.fromkeys(map_.strings, " "), around=True)


def _bert(settings: Settings) -> list[Step]:
    """BertNormalizer in its parts: each is asked for what it does to single characters."""
    accents = settings.get("strip_accents")
    strip = settings["lowercase"] if accents is None else accents

    def part(name: str) -> Map:
        names = ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase")
        only = {n: n == name for n in names}
        return Map(mapped_characters(reference_normalizer({"type": "BertNormalizer", **only})))

    steps: list[Step] = []
    if settings["clean_text"]:
        steps.append(part("clean_text"))
    if settings["handle_chinese_chars"]:
        steps.append(_around(part("handle_chinese_chars")))
    if strip:
        # It takes characters apart first; of marks alone, what is left of them is asked.
        form = normalization_form("NFD")
        gone = part("strip_accents").strings.items()
        marks: dict[int, str] = {code: string for code, string in gone if not string}
        steps += [form, Map(marks)]
    if settings["lowercase"]:
        steps.append(part("lowercase"))
    return steps


def _precompiled(settings: Settings) -> list[Step]:
    encoded = settings.get("precompiled_charsmap")
    return [charsmap(encoded)] if encoded else []


_KINDS: dict[str, Callable[[Settings], list[Step]]] = {
    "Precompiled": _precompiled,
    **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD"), _form),
    "BertNormalizer": _bert,
    "Lowercase": _asked,
    "StripAccents": _asked,
    "Nmt": _asked,
    "Prepend": _prepend,
    "Replace": _replace,
    "Strip": _strip,
}
