"""A conversation as the row of what a template writes of it: texts, tools, calls of tools.

Tools come behind the first message where that is the system's, else before all messages. A call is
its function's name and the object of its arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant")
EDGE = ""  # the kind of what is before the first item, and behind the last
TOOL_RESULT = "tool"  # the role of what a call gave
# Kinds that are no roles begin with a plus, as no role may.
TOOLS = "+tools"  # one that may be called
SAYS = "+says"  # an assistant's text before its calls
CALL, MORE = "+call", "+more"  # the name of a message's first call, and of those that follow it
ARGUMENTS = "+arguments"
TEXTS = (*ROLES, TOOL_RESULT, SAYS)  # kinds whose value is a text of any characters

Message = dict[str, Any]
"""``role`` and ``content``; an assistant's may have ``tool_calls``, as OpenAI's has them, their
``arguments`` an object."""

Tool = dict[str, Any]
"""{"type": "function", "function": {"name", "description", "parameters"}}."""


@dataclass(frozen=True)
class Item:
    """``value``: a text; of tools and arguments an object of JSON."""

    kind: str
    value: Any


def items_of(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Item]:
    """What a template writes of a conversation, in order."""
    return list(_items(messages, tools))


def _items(messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[Item]:
    offered = [Item(TOOLS, tool) for tool in tools]
    behind = 1 if messages and messages[0]["role"] == "system" else 0
    for number, message in enumerate(messages):
        if number == behind:
            yield from offered
        yield from _of_message(message)
    if behind == len(messages):
        yield from offered


def _of_message(message: Message) -> Iterator[Item]:
    calls = message.get("tool_calls")
    if not calls:
        role = message["role"]
        yield Item(f"no role {role}" if role.startswith("+") else role, message["content"])
        return
    if message.get("content"):
        yield Item(SAYS, message["content"])
    for number, call in enumerate(calls):
        yield Item(MORE if number else CALL, call["function"]["name"])
        yield Item(ARGUMENTS, call["function"]["arguments"])


def call_message(content: str, calls: Sequence[tuple[str, Any]], id_: str = "call") -> Message:
    """An assistant's message that calls functions, by their names and arguments."""
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {"id": f"{id_}{i}", "type": "function",
             "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ],
    }  # fmt: skip
