"""slm-serve writes tools and calls as jinja2 does, and reads calls in what a model writes."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from tokenizers import Tokenizer

import slmtvm
from slmtvm.constrain import constrain
from slmtvm.runtime.serving import server_program
from slmtvm.text.chat import ChatTemplate, compile_chat
from slmtvm.text.chat.random_chat import random_conversation, random_tools
from tests.codegen.programs.serving import Server, client_of, serving
from tests.importer.graph_builder import save
from tests.importer.graphs import Tiny, build
from tests.models import TOKENIZER
from tests.text.chat_templates import HEADERS, TAGS, TOKENS, rendered

pytestmark = pytest.mark.slow
FEW, MANY = 100, 1000  # conversations
CONTEXT = 2048
TOOLS = [
    {"type": "function", "function": {
        "name": "drive", "description": "Drive \"there\".",
        "parameters": {
            "type": "object",
            "properties": {"to": {"enum": ["home", "wörk"]}, "fast": {"type": "boolean"}},
            "required": ["to", "fast"]}}},
    {"type": "function", "function": {"name": "stop"}},
]  # fmt: skip
ASKED: list[Any] = [{"role": "user", "content": "go home"}]
CALLS = (
    '<tool_call>\n{"name": "drive", "arguments": {"to": "wörk", "fast": true}}\n</tool_call>',
    '<tool_call> {"arguments":{}, "name":"stop"} </tool_call>',
)
SPOKEN = {
    "both": "I go.\n" + "\n".join(CALLS),
    "first": CALLS[0],
    "unknown": CALLS[0].replace("drive", "fly"),
    "broken": CALLS[0].replace("true}", "true"),
    "more": CALLS[1] + " and more",
    "long": CALLS[0].replace("home", "x").replace("true", '"' + 12 * "é🐍 " + '"'),
}
BARE = {
    "call": ' {"name": "stop", "parameters": {"x": [1, {}]}}',
    "object": '{"nome": "stop", "parameters": {}}',
    "behind": 'So: {"name": "stop", "parameters": {}}',
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random weights with the demo model's tokenizer, and room for long prompts."""
    folder = tmp_path_factory.mktemp("small")
    save(build(Tiny(vocab=4096, hidden=32, heads=2, kv_heads=2, head_dim=16, ffn=64)), folder)
    model = folder / "model.onnx"
    return slmtvm.compile(
        model, output=folder / "small.slm", context=CONTEXT, tokenizer=TOKENIZER
    ).path


@pytest.fixture(scope="module")
def program(small: Path) -> Path:
    return server_program(small)


@pytest.fixture(scope="module")
def bundles(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundle with templates that have tools."""
    made = {}
    for name, source in (("tags", TAGS), ("headers", HEADERS)):
        made[name] = tmp_path_factory.mktemp("tools") / f"{name}.slm"
        made[name].mkdir()
        for file in small.iterdir():
            (made[name] / file.name).symlink_to(file)
        pieces = compile_chat(ChatTemplate(source, TOKENS))
        (made[name] / "chat.json").write_bytes(pieces.to_json())
    return made


def saying(bundle: Path, texts: dict[str, str], folder: Path) -> list[str]:
    """Options of a server that has constraints by the names of texts, and the folder's."""
    for name, text in texts.items():
        constrain(bundle, choices=[text], output=folder / name)
    named = [o for f in sorted(folder.iterdir()) for o in ("--constraint", f"{f.name}={f}")]
    return ["--name", "small", *named]


@pytest.fixture(scope="module")
def tags(
    program: Path, bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    folder, bundle = tmp_path_factory.mktemp("constraints"), bundles["tags"]
    constrain(bundle, tools=TOOLS, output=folder / "any")
    constrain(bundle, tools=TOOLS, tool="stop", output=folder / "stop")
    options = saying(bundle, SPOKEN, folder)
    with serving(program, bundle, options) as server, client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def headers(
    program: Path, bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    options = saying(bundles["headers"], BARE, tmp_path_factory.mktemp("bare"))
    with serving(program, bundles["headers"], options) as server:
        yield server


def as_openai_sends(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arguments as JSON in a string, and no content where there is none."""
    sent = json.loads(json.dumps(messages))
    for message in sent:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        if "tool_calls" in message and not message["content"]:
            message["content"] = None
    return list(sent)


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("name", "source"), [("tags", TAGS), ("headers", HEADERS)])
def test_conversations_have_the_tokens_of_what_jinja2_writes(
    request: pytest.FixtureRequest, name: str, source: str, count: int
) -> None:
    from datetime import datetime

    served = request.getfixturevalue(name)
    port = served.port if isinstance(served, Server) else served.base_url.port
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    r, compared = random.Random(17), 0
    while compared < count:
        messages = random_conversation(r, calls=True)
        tools = random_tools(r)[:2] if r.random() < 0.7 else []
        text = rendered(source, messages, tools, day=f"{datetime.now():%d %b %Y}")
        if text is None or not 0 < len(text) < 3 * CONTEXT:
            continue
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        if len(expected) > CONTEXT:
            continue
        body = {"messages": as_openai_sends(messages), **({"tools": tools} if tools else {})}
        given = {"Content-Type": "application/json"}
        connection.request("POST", "/tokenize", json.dumps(body), given)
        answer = json.loads(connection.getresponse().read())
        if "error" in answer:  # an order that the pieces do not take
            assert "chat template takes no message" in answer["error"]["message"] or (
                "begins no answer" in answer["error"]["message"]
            ), answer
            continue
        assert answer["tokens"] == expected, messages
        compared += 1
    connection.close()


def ask(client: openai.OpenAI, said: str | None = None, **more: Any) -> Any:
    """An answer that is held to one of SPOKEN."""
    if said is not None:
        wanted = {"type": "json_schema", "json_schema": {"name": said}}
        more["extra_body"] = {"response_format": wanted}
    given = {"messages": ASKED, "tools": TOOLS, "temperature": 0, "max_tokens": 200, **more}
    return client.chat.completions.create(model="small", **given)


def of_stream(events: Any) -> tuple[str, list[tuple[str, str, str]], str]:
    """The content of a stream, its calls (id, name, arguments), and why it ended."""
    content, calls, reason = "", [], ""
    for event in events:
        delta = event.choices[0].delta
        content += delta.content or ""
        for part in delta.tool_calls or ():
            if part.index == len(calls):
                assert part.type == "function"
                calls.append((part.id, part.function.name, ""))
            id_, name, arguments = calls[part.index]
            calls[part.index] = (id_, name, arguments + part.function.arguments)
        reason = event.choices[0].finish_reason or reason
    return content, calls, reason


def of_whole(answer: Any) -> tuple[str | None, list[tuple[str, str, str]], str]:
    """The same of an answer that comes at once."""
    message = answer.choices[0].message
    calls = [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or ()]
    return message.content, calls, answer.choices[0].finish_reason


def test_calls_are_read_in_what_the_model_writes(tags: openai.OpenAI) -> None:
    content, calls, reason = of_whole(ask(tags, "both"))
    assert (content, reason) == ("I go.", "tool_calls")
    assert [call[1:] for call in calls] == [
        ("drive", '{"to": "wörk", "fast": true}'), ("stop", "{}"),
    ]  # fmt: skip
    assert len({call[0] for call in calls}) == 2
    content, calls, _ = of_whole(ask(tags, "first"))
    assert content is None and [call[1] for call in calls] == ["drive"]


@pytest.mark.parametrize("said", ["both", "first", "long"])
def test_a_stream_brings_the_same_content_and_calls(tags: openai.OpenAI, said: str) -> None:
    content, calls, reason = of_stream(ask(tags, said, stream=True))
    whole = of_whole(ask(tags, said))
    assert (content, reason) == (whole[0] or "", "tool_calls")
    assert [c[1:] for c in calls] == [c[1:] for c in whole[1]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", ["unknown", "broken", "more"])
def test_what_is_no_call_of_a_tool_is_text(tags: openai.OpenAI, said: str, stream: bool) -> None:
    answer = ask(tags, said, stream=stream)
    told = of_stream(answer) if stream else of_whole(answer)
    assert told == (SPOKEN[said], [], "stop")


def test_calls_are_text_where_none_may_come_and_one_where_one_may(tags: openai.OpenAI) -> None:
    assert of_whole(ask(tags, "both", tool_choice="none")) == (SPOKEN["both"], [], "stop")
    _, calls, _ = of_whole(ask(tags, "both", parallel_tool_calls=False))
    assert [call[1] for call in calls] == ["drive"]


@pytest.mark.parametrize("seed", range(3))
def test_a_call_that_is_required_comes_with_valid_arguments(tags: openai.OpenAI, seed: int) -> None:
    content, calls, reason = of_whole(ask(tags, tool_choice="required", temperature=1.5, seed=seed))
    assert content is None and reason == "tool_calls" and len(calls) == 1
    parameters = {t["function"]["name"]: t["function"].get("parameters", {}) for t in TOOLS}  # type: ignore[index]
    jsonschema.validate(json.loads(calls[0][2]), parameters[calls[0][1]])
    stop = {"type": "function", "function": {"name": "stop"}}
    assert of_whole(ask(tags, tool_choice=stop))[1][0][1:] == ("stop", "{}")


def test_what_a_call_gave_is_answered(tags: openai.OpenAI) -> None:
    first = ask(tags, "both").choices[0].message
    assert first.tool_calls is not None
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "done"} for call in first.tool_calls
    ]
    messages = [*ASKED, first, *results]
    answer = ask(tags, messages=messages, max_tokens=4)
    text = rendered(
        TAGS,
        [
            *ASKED,
            {"role": "assistant", "content": first.content, "tool_calls": [
                {"function": {"name": c.function.name,
                              "arguments": json.loads(c.function.arguments)}}
                for c in first.tool_calls]},
            *results,
        ],
        TOOLS,
    )  # fmt: skip
    assert text is not None
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    assert answer.usage.prompt_tokens == len(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"tool_choice": "required", "tools": TOOLS[:1]}, "tool_choice", "were not compiled"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice",
         "a function of tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"messages": [{"role": "+says", "content": "x"}]}, "messages", "has no role"),
        ({"tools": {}}, "tools", "must be an array"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "name must be"),
        ({"tools": [{"type": "retrieval"}]}, "tools", "type must be function"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "tools",
         "must be a JSON schema"),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [
            {"function": {"name": "stop", "arguments": "{"}}]}]}, "messages", "no JSON object"),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
         "messages", "no name of a function"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tools_is_said(
    tags: openai.OpenAI, more: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        ask(tags, **more)
    assert caught.value.param == param


def test_a_name_that_an_object_has_twice_is_refused(headers: Server) -> None:
    body = '{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", '
    body += '"function": {"name": "f", "parameters": {"a": 1, "\\u0061": 2}}}]}'
    connection = http.client.HTTPConnection("127.0.0.1", headers.port, timeout=60)
    connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    assert answer["error"]["message"] == "tools: an object has a name twice"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_with_nothing_around_it_is_the_whole_text(headers: Server, stream: bool) -> None:
    """As Llama's family writes it."""
    with client_of(headers) as client:
        told = {
            said: (of_stream if stream else of_whole)(ask(client, said, stream=stream))
            for said in BARE
        }
    content, calls, reason = told["call"]
    assert (content or None, [c[1:] for c in calls], reason) == (
        None, [("stop", '{"x": [1, {}]}')], "tool_calls"
    )  # fmt: skip
    for said in ("object", "behind"):
        assert told[said] == (BARE[said], [], "stop")


def test_a_text_before_calls_is_refused_where_a_template_leaves_it_out(headers: Server) -> None:
    calling = {"role": "assistant", "content": "x", "tool_calls": [
        {"function": {"name": "stop", "arguments": "{}"}}]}  # fmt: skip
    status, answer = headers.ask("/v1/chat/completions", {"messages": [*ASKED, calling]})
    assert status == 400 and 'no message of "says"' in answer["error"]["message"]
