"""Random conversations and tools, on which what was made of a chat template is checked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from slmtvm.text.chat.items import ROLES, TOOL_RESULT, Message, Tool, call_message

_MOST_MESSAGES = 9
_MOST_TOOLS = 4
_CHARACTERS = "abc  \n\t<>|[]/{}'\"\\&\u00a0\u3000é漢🐍"
_NAME = "abcXYZ019_-"


def random_conversation(
    r: random.Random, *, calls: bool = False, words: Sequence[str] = ()
) -> list[Message]:
    """Messages of roles in turns as they are usual, or in any order.

    With ``calls`` assistants call tools, too, and those answer. ``words`` are in some texts.
    """
    messages: list[Message] = []
    usual = r.random() < 0.7
    if usual and r.random() < 0.5:
        messages.append({"role": "system", "content": random_text(r, words)})
    for _ in range(r.randrange(1, _MOST_MESSAGES + 1)):
        last = messages[-1]["role"] if messages else ""
        role = r.choice((*ROLES, TOOL_RESULT) if calls else ROLES)
        if usual:
            role = "assistant" if last in ("user", TOOL_RESULT) else "user"
            if calls and last == TOOL_RESULT and r.random() < 0.4:
                role = TOOL_RESULT
        if role == "assistant" and calls and r.random() < 0.5:
            messages.append(_random_calls(r, words))
            if usual:
                messages.append({"role": TOOL_RESULT, "content": random_text(r, words)})
        else:
            messages.append({"role": role, "content": random_text(r, words)})
    return messages


def _random_calls(r: random.Random, words: Sequence[str]) -> Message:
    text = random_text(r, words) if r.random() < 0.3 else ""
    count = 1 if r.random() < 0.7 else r.randrange(2, 4)
    return call_message(text, [(random_name(r), random_object(r)) for _ in range(count)])


def random_tools(r: random.Random) -> list[Tool]:
    """One to four, with parameters of any JSON."""
    return [
        {"type": "function", "function": {
            "name": random_name(r), "description": random_text(r), "parameters": random_object(r)}}
        for _ in range(r.randrange(1, _MOST_TOOLS + 1))
    ]  # fmt: skip


def random_name(r: random.Random) -> str:
    """A function's name as OpenAI takes it."""
    return "".join(r.choices(_NAME, k=r.randrange(1, 12)))


def random_text(r: random.Random, words: Sequence[str] = ()) -> str:
    """Characters of many kinds, white space around them, and sometimes one of ``words``."""
    text = "".join(r.choices(_CHARACTERS, k=r.choice((0, 1, 5, 40))))
    return f"{text}{r.choice(words)}{text}" if words and r.random() < 0.1 else text


def random_object(r: random.Random, depth: int = 3) -> dict[str, Any]:
    """An object of JSON, of to four fields."""
    return {random_text(r): _random_value(r, depth) for _ in range(r.randrange(5))}


def _random_value(r: random.Random, depth: int) -> Any:
    kind = r.randrange(9 if depth else 7)
    if kind == 7:
        return random_object(r, depth - 1)
    if kind == 8:
        return [_random_value(r, depth - 1) for _ in range(r.randrange(4))]
    exponent = r.choice((0, 0, 3, -4, -7, 15, 16, 22, 300, -300))
    return (
        None, True, False, random_text(r), r.randrange(-1000, 10**r.randrange(4, 25)),
        r.uniform(-1, 1) * 10.0**exponent, float(r.randrange(100)) * 10.0 ** min(exponent, 22),
    )[kind]  # fmt: skip
