"""Tools and calls of them are written as jinja2 writes them; where that cannot be, it says why."""

from __future__ import annotations

import random

import pytest

from slmtvm.errors import SlmError
from slmtvm.text.chat import ChatPieces, ChatTemplate, compile_chat
from slmtvm.text.chat.items import call_message
from slmtvm.text.chat.random_chat import random_conversation, random_tools
from tests.text.chat_templates import DAY, FAMILIES, HEADERS, TAGS, TOKENS, rendered

FEW, MANY = 200, 1000  # conversations
TOOLS = random_tools(random.Random(3))
ASKED = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def families() -> dict[str, ChatPieces]:
    return {name: compile_chat(ChatTemplate(FAMILIES[name], TOKENS)) for name in FAMILIES}


@pytest.mark.slow
@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", FAMILIES)
def test_conversations_with_tools_are_written_as_jinja2_writes_them(
    families: dict[str, ChatPieces], name: str, count: int
) -> None:
    pieces = families[name]
    assert (pieces.reason, pieces.tools_reason) == (None, None)
    r = random.Random(11)
    taken = with_tools = with_calls = results = 0
    while taken < count:
        messages = random_conversation(r, calls=True)
        tools = random_tools(r) if r.random() < 0.7 else []
        made = pieces.text(messages, tools, clock=lambda form: "01 Jan 2031" * (form == DAY))
        if made is None:
            continue
        assert made == rendered(FAMILIES[name], messages, tools), messages
        taken += 1
        with_tools += bool(tools)
        with_calls += any("tool_calls" in m for m in messages)
        results += messages[-1]["role"] == "tool"
    assert min(with_tools, with_calls) > count // 10 and results > count // 20


@pytest.mark.slow
def test_how_a_model_writes_calls_is_read_off_its_template(families: dict[str, ChatPieces]) -> None:
    found = {n: (c.begin, c.key, c.end) for n, p in families.items() if (c := p.calls)}
    assert found == {
        "tags": ("<tool_call>", "arguments", "</tool_call>"),
        "headers": ("", "parameters", ""),
        "list": ("<|call|>", "arguments", "<|/call|>"),
    }


@pytest.mark.slow
def test_pieces_with_tools_survive_their_file(families: dict[str, ChatPieces]) -> None:
    for pieces in families.values():
        assert ChatPieces.from_json(pieces.to_json().decode()) == pieces


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("tool | tojson", "tool.function.name"), "it does not write each tool once as JSON"),
        (("tool | tojson", "tool | tojson(separators=(',', ':'))"), "each tool once as JSON"),
        (("+ call.function.name", "+ call.id + call.function.name"), "it writes the ids of calls"),
        (("functions:\\n<tools>'", "functions:' ~ tools | length"), "depends on more than these"),
        (("'<|im_start|>assistant' }}", "'<|im_start|>assistant' }}{{ tools | tojson }}"),
         "each tool once"),
        (("tool in tools", "tool in tools[:3]"), "is not the sum of its pieces"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_template_that_does_more_with_tools_is_compiled_without_them(
    change: tuple[str, str], reason: str
) -> None:
    assert change[0] in TAGS
    pieces = compile_chat(ChatTemplate(TAGS.replace(*change), TOKENS))
    assert pieces.reason is None and pieces.calls is None
    assert pieces.tools_reason is not None and reason in pieces.tools_reason
    assert pieces.text(ASKED) == rendered(TAGS, ASKED) and pieces.text(ASKED, TOOLS) is None
    # Python has jinja2, and uses it.
    assert pieces.prompt(ASKED, TOOLS) == rendered(TAGS.replace(*change), ASKED, TOOLS)


def test_a_template_without_tools_says_so() -> None:
    turns = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
    pieces = compile_chat(ChatTemplate(turns, {}))
    assert (pieces.reason, pieces.tools_reason) == (None, "it has no place for tools")


@pytest.mark.slow
def test_the_day_is_that_of_the_request(families: dict[str, ChatPieces]) -> None:
    for day in ("29 Feb 2028", "01 Mar 2028"):
        made = families["headers"].text(ASKED, clock=lambda form, day=day: day * (form == DAY))
        assert made == rendered(HEADERS, ASKED, day=day)
    assert DAY not in families["headers"].prompt(ASKED)


@pytest.mark.slow
def test_an_order_that_a_template_refuses_is_refused(families: dict[str, ChatPieces]) -> None:
    two = [*ASKED, call_message("", [("f", {}), ("g", {})])]
    assert families["tags"].text(two) is not None
    assert families["headers"].text(two) is None and rendered(HEADERS, two) is None
    with pytest.raises(SlmError, match="no messages in this order: user, assistant"):
        families["headers"].prompt(two)
