"""A chat template compiled to what stands between items, for devices without jinja2.

A template is a program in jinja2. Most write, of each message, its text between strings that depend
on the kinds of the message and of the one before alone. That is found out by running the template
on conversations of marks, and checked on random ones; a template that does more is not compiled.
Where tools are offered it may write other strings: those are found out by themselves.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slmtvm.text.chat.calls import call_syntax
from slmtvm.text.chat.items import (
    ARGUMENTS,
    EDGE,
    ROLES,
    TEXTS,
    TOOL_RESULT,
    TOOLS,
    Item,
    Message,
    Tool,
    call_message,
    items_of,
)
from slmtvm.text.chat.pieces import CLOCK, CLOCK_END, QUOTED, TRIMMED, ChatPieces, Table, written
from slmtvm.text.chat.random_chat import random_conversation, random_tools
from slmtvm.text.chat.template import (
    ChatTemplate,
    NotSeparableError,
    Render,
    find_chat_template,
    rendered,
    renderer,
)

_PROBED_MESSAGES = 4
_PROBED_WITH_TOOLS = 3
_RANDOM_CONVERSATIONS = 1000
_LONGEST_LITERAL = 120  # bytes; `own` of codegen/programs/shared_chat.c
_ID = "\ue002"  # in the ids of calls, which no piece may have
_JSON_FORMS = ({"indent": None}, {"indent": 4}, {"indent": 2})
_FORMS: dict[str, Sequence[Any]] = {
    TOOLS: [{**form, "whole": whole} for whole in (True, False) for form in _JSON_FORMS],
    ARGUMENTS: _JSON_FORMS,
    **dict.fromkeys(TEXTS, (None, QUOTED, TRIMMED)),
}

# Makes the messages of a conversation's part; the number keeps marks apart.
Say = Callable[[int], Message]


def chat_pieces(model: str | Path) -> ChatPieces | None:
    """The pieces of the template beside the ONNX file ``model``; None where there is none.

    Raises as ``find_chat_template`` and ``compile_chat`` do.
    """
    template = find_chat_template(model)
    return None if template is None else compile_chat(template)


def compile_chat(template: ChatTemplate) -> ChatPieces:
    """The pieces of a template; with ``reason`` where it cannot be taken apart exactly.

    Raises SlmError where jinja2 is missing.
    """
    forms: set[str] = set()

    def clock(form: str) -> str:
        forms.add(form)
        return f"{CLOCK}{form}{CLOCK_END}"

    try:
        if "now(" in template.source.replace("strftime_now(", ""):
            raise NotSeparableError("it writes the date (now)")
        render = renderer(template, clock)
        literals = _literals(template.source)
        offering, tools_reason = _or_why(lambda: _offering(render, template, forms, literals))
        plain = None
        if offering is not None:  # calls and results may come without tools
            plain, _ = _or_why(lambda: _table(render, _ALL, _PROBED_WITH_TOOLS, [], literals))
        plain = plain or _table(render, _PLAIN, _PROBED_MESSAGES, [], literals)
        _check_times(plain, forms)
    except NotSeparableError as error:
        return ChatPieces(reason=str(error), tools_reason=str(error), template=template)
    calls = None if offering is None else call_syntax(offering.between, template.tokens)
    return ChatPieces(plain, offering, calls, None, tools_reason, template)


def _or_why(make: Callable[[], Table]) -> tuple[Table | None, str | None]:
    try:
        return make(), None
    except NotSeparableError as error:
        return None, str(error)


def _offering(
    render: Render, template: ChatTemplate, forms: set[str], literals: Sequence[str]
) -> Table:
    """The table of conversations that offer tools."""
    if not ChatPieces(template=template).names_tools:
        raise NotSeparableError("it has no place for tools")
    table = _table(render, _ALL, _PROBED_WITH_TOOLS, _marked_tools(2), literals)
    _check_times(table, forms)
    return table


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"  # private characters, which no template has


def _says(role: str) -> Say:
    return lambda number: {"role": role, "content": f" {_mark(number)}\n"}


def _gives(number: int) -> Message:
    return {"role": TOOL_RESULT, "content": f" {_mark(number)}\n", "tool_call_id": _ID}


def _calls(count: int, text: str = "") -> Say:
    def say(number: int) -> Message:
        calls = [
            (f"f{_mark(100 + number)}x{i}", {"a": {_mark(200 + number): [i, {"b": None}]}})
            for i in range(count)
        ]
        return call_message(text and f" {text}{_mark(number)}\n", calls, _ID)

    return say


def _marked_tools(count: int) -> list[Tool]:
    return [
        {"type": "function", "function": {
            "name": f"t{_mark(i)}", "description": "d",
            "parameters": {"type": "object", "properties": {"p": {"type": "string"}}}}}
        for i in range(count)
    ]  # fmt: skip


_PLAIN = [_says(role) for role in ROLES]
_ALL = [*_PLAIN, _gives, _calls(1), _calls(2), _calls(1, "t")]


def _table(
    render: Render, says: Sequence[Say], most: int, tools: list[Tool], literals: Sequence[str]
) -> Table:
    """The table of conversations of ``says``; with ``tools``, of those that offer any of them."""
    table = Table()
    offers = [tools[:n] for n in range(1, len(tools) + 1)] or [[]]
    orders = [
        order
        for n in range(1, most + 1)
        for order in itertools.product(says, repeat=n)
        if len(says) == len(ROLES) or _begins_usual(order)
    ]
    # After an assistant's message an answer is seldom asked for, and some templates write that
    # message otherwise where it is the last: then such conversations are not taken.
    ends = [o for o in orders if o[-1](0)["role"] == "assistant"]
    for order, offered in itertools.product([o for o in orders if o not in ends], offers):
        _learn(render, order, offered, table)
    whole = copy.deepcopy(table)
    try:
        for order, offered in itertools.product(ends, offers):
            _learn(render, order, offered, whole)
        table = whole
    except NotSeparableError:
        if not table.between:
            raise
    if not table.between:
        raise NotSeparableError("it writes the texts of no conversation")
    if not any(EDGE in after for after in table.between.values()):
        raise NotSeparableError("it begins no answer")
    if tools and TOOLS not in table.between:
        raise NotSeparableError("it writes no tools as JSON")
    refused = _refused(render, table, says, tools, literals)
    table = Table(table.between, table.forms, refused)
    _check(render, table, bool(tools), len(says) > len(ROLES), literals)
    return table


def _begins_usual(order: Sequence[Say]) -> bool:
    """Whether a user's message comes first, or behind the system's: some templates write tools
    into it, whatever it is."""
    roles = [say(0)["role"] for say in order]
    return "user" in (roles[0], *(roles[1:2] if roles[0] == "system" else ()))


def _learn(render: Render, order: Sequence[Say], tools: Sequence[Tool], table: Table) -> None:
    messages = [say(10 + i) for i, say in enumerate(order)]
    text = rendered(render, messages, tools)
    if text is not None:
        _take_apart(text, items_of(messages, tools), table)


def _take_apart(text: str, items: Sequence[Item], table: Table) -> None:
    """Learn from a conversation's text; where it leaves an item out, that it is not taken."""
    if _ID in text:
        raise NotSeparableError("it writes the ids of calls")
    marks = [re.search("\ue000\\d+\ue001", json.dumps(i.value, ensure_ascii=False)) for i in items]
    if any(mark is None or mark[0] not in text for mark in marks):
        return
    before, at = EDGE, 0
    for item in items:
        place, length = _place(text, item, at, table)
        _set(table.between, before, item.kind, text[at:place])
        before, at = item.kind, place + length
    _set(table.between, before, EDGE, text[at:])


def _place(text: str, item: Item, at: int, table: Table) -> tuple[int, int]:
    """Where an item is written behind ``at``, and how long that is; learns its form."""
    for form in _FORMS.get(item.kind, (None,)):
        value = written(item, form)
        if (place := text.find(value, at)) >= 0:
            break
    if place < 0 or text.count(value) != 1:
        name = {TOOLS: "each tool", ARGUMENTS: "the arguments of each call"}.get(
            item.kind, f"each text of {item.kind.strip('+')}"
        )
        how = " as JSON" if item.kind in (TOOLS, ARGUMENTS) else ""
        raise NotSeparableError(f"it does not write {name} once{how}, in their order")
    if table.forms.setdefault(item.kind, form) != form:
        raise NotSeparableError(f"it writes some of {item.kind.strip('+')} otherwise than others")
    return place, len(value)


def _set(between: dict[str, dict[str, str]], before: str, after: str, piece: str) -> None:
    if "\ue000" in piece or between.setdefault(before, {}).setdefault(after, piece) != piece:
        raise NotSeparableError(
            f"what it writes between {before.strip('+') or 'the start'} and "
            f"{after.strip('+') or 'the end'} depends on "
            "more than these two"
        )


def _check_times(table: Table, forms: set[str]) -> None:
    """Times must stand in the pieces as they were asked for."""
    for piece in (p for after in table.between.values() for p in after.values()):
        for form in forms:
            piece = piece.replace(f"{CLOCK}{form}{CLOCK_END}", "")
        if CLOCK in piece or CLOCK_END in piece:
            raise NotSeparableError("it writes the date in a form of its own (strftime_now)")


def _literals(source: str) -> list[str]:
    """The strings that a template's expressions name: what it may look for in a text."""
    from jinja2 import Environment, nodes

    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    found = {c.value for c in tree.find_all(nodes.Const) if isinstance(c.value, str)}
    short = {text for text in found if text.strip() and len(text.encode()) <= _LONGEST_LITERAL}
    return sorted(short - set(ROLES) - {"role", "content", "tool", "tool_calls"})


def _refused(
    render: Render,
    table: Table,
    says: Sequence[Say],
    tools: list[Tool],
    literals: Sequence[str],
) -> dict[str, tuple[str, ...]]:
    """The literals that change more than their place where a text has them."""
    found: dict[str, tuple[str, ...]] = {}
    for kind in TEXTS:
        of_kind = [
            messages
            for order in _orders_with(kind, says)
            if table.text(items_of(messages := [say(10 + i) for i, say in enumerate(order)], tools))
            is not None
        ]
        bad = tuple(
            word
            for word in literals
            if of_kind and not _holds_with(render, table, of_kind, tools, kind, word)
        )
        if bad:
            found[kind] = bad
    return found


def _orders_with(kind: str, says: Sequence[Say]) -> list[tuple[Say, ...]]:
    """Conversations with a text of a kind, among others of all kinds."""
    if len(says) == len(ROLES):
        orders = [order for n in (1, 2, 3) for order in itertools.product(says, repeat=n)]
        return [o for o in orders if any(say(0)["role"] == kind for say in o)]
    system, user, assistant = _PLAIN
    before: tuple[tuple[Say, ...], ...] = (
        (), (user,), (system, user), (user, assistant), (user, _calls(1), _gives)
    )  # fmt: skip
    of_kind = [say for say in says if items_of([say(0)])[0].kind == kind]
    return [(*b, say, *a) for b in before for say in of_kind for a in ((), (user,))]


def _holds_with(
    render: Render,
    table: Table,
    conversations: Sequence[Sequence[Message]],
    tools: Sequence[Tool],
    kind: str,
    word: str,
) -> bool:
    for content in (word, f"a {word} b"):
        for conversation in conversations:
            messages = [
                {**m, "content": content} if items_of([m])[0].kind == kind else m
                for m in conversation
            ]
            if rendered(render, messages, tools) != table.text(items_of(messages, tools)):
                return False
    return True


def _check(
    render: Render, table: Table, with_tools: bool, with_calls: bool, literals: Sequence[str]
) -> None:
    """Raise NotSeparableError where a random conversation is not what the pieces make of it."""
    for messages, tools in itertools.islice(
        _random(table, with_tools, with_calls, literals), _RANDOM_CONVERSATIONS
    ):
        if table.text(items_of(messages, tools)) != rendered(render, messages, tools):
            order = ", ".join(message["role"] for message in messages)
            raise NotSeparableError(f"it is not the sum of its pieces for {order}")


def _random(
    table: Table, with_tools: bool, with_calls: bool, literals: Sequence[str]
) -> Iterator[tuple[list[Message], list[Tool]]]:
    """Conversations that the pieces take."""
    r = random.Random(0)
    for _ in range(20 * _RANDOM_CONVERSATIONS):
        messages = random_conversation(r, calls=with_calls, words=literals)
        items = items_of(messages, _marked_tools(1) if with_tools else [])
        if table.takes(items) and table.text(items) is not None:
            yield messages, random_tools(r) if with_tools else []
