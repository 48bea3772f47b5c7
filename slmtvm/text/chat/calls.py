"""How a model writes the calls of tools, read off what its chat template writes of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slmtvm.text.chat.items import ARGUMENTS, CALL, EDGE, MORE
from slmtvm.text.end_marks import END_MARKS

_OPENING = re.compile(r'(?P<begin>.*?)\{\s*"name":\s*"', re.DOTALL)
_MIDDLE = re.compile(r'",\s*"(?P<key>\w+)":\s*')
_CLOSING = re.compile(r"\s*\}(?P<end>.*)", re.DOTALL)


@dataclass(frozen=True)
class CallSyntax:
    """``begin`` {"name": ..., ``key``: {...}} ``end``; begin and end may be empty.

    ``opening``, ``middle`` and ``closing`` are what the template itself writes before the name,
    between it and the arguments, and behind them.
    """

    begin: str
    key: str
    end: str
    opening: str
    middle: str
    closing: str


def _common_beginning(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(character for character, _ in same)


def call_syntax(
    between: Mapping[str, Mapping[str, str]], tokens: Mapping[str, str]
) -> CallSyntax | None:
    """The syntax of a template's calls by its pieces; None where it is none of these."""
    prompt, asked = (between.get("user", {}).get(kind) for kind in (EDGE, CALL))
    behind = [piece for kind, piece in between.get(ARGUMENTS, {}).items() if kind != MORE]
    middle = between.get(CALL, {}).get(ARGUMENTS, "")
    if prompt is None or asked is None or not asked.startswith(prompt) or not behind:
        return None
    opening, closing = asked[len(prompt) :], _common_beginning(behind)
    # What ends a turn stands behind a call as it does behind a text of the assistant.
    turn_ends = [mark for mark in (*END_MARKS, tokens.get("eos_token", "")) if mark]
    if turn_end := _common_beginning([*between.get("assistant", {}).values()] or [""]):
        turn_ends.append(turn_end)
    for mark in turn_ends:
        closing = closing.split(mark)[0]
    parts = _OPENING.fullmatch(opening), _MIDDLE.fullmatch(middle), _CLOSING.fullmatch(closing)
    if parts[0] is None or parts[1] is None or parts[2] is None:
        return None
    begin, end = parts[0]["begin"].strip(), parts[2]["end"].strip()
    return CallSyntax(begin, parts[1]["key"], end, opening, middle, closing.rstrip())
