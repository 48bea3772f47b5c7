"""slm-serve holds an answer to a constraint that it was started with, and heeds penalties."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from slmtvm.constrain import constrain
from slmtvm.runtime import load
from slmtvm.runtime.text import generate_text
from tests.codegen.programs.serving import Server, client_of, serving
from tests.models import PROMPTS

pytestmark = pytest.mark.slow
TOKENS = 40
SCHEMA = {
    "type": "object",
    "properties": {
        "go": {"enum": ["left", "right", "forwärts"]},
        "far": {"type": "number", "minimum": 0, "maximum": 9},
        "say": {"type": "string", "maxLength": 12},
    },
    "required": ["go", "say"],
}


@pytest.fixture(scope="module")
def files(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("constraints")
    constrain(demo, json_schema=SCHEMA, output=folder / "command")
    constrain(demo, choices=["yes", "no"], output=folder / "answer")
    return {name: folder / name for name in ("command", "answer")}


@pytest.fixture(scope="module")
def server(program: Path, chat_bundle: Path, files: dict[str, Path]) -> Iterator[Server]:
    options = [f"--constraint={name}={path}".split("=", 1) for name, path in files.items()]
    with serving(program, chat_bundle, [word for pair in options for word in pair]) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def asking(name: str, schema: object = None) -> dict[str, Any]:
    wanted = {"name": name} if schema is None else {"name": name, "schema": schema}
    return {"type": "json_schema", "json_schema": wanted}


def complete(client: openai.OpenAI, prompt: str = PROMPTS[0], **more: Any) -> Any:
    given = {"temperature": 0, "max_tokens": TOKENS, **more}
    return client.completions.create(model="chat", prompt=prompt, **given)


def test_an_answer_is_the_text_that_a_session_writes_under_the_constraint(
    client: openai.OpenAI, demo: Path, files: dict[str, Path]
) -> None:
    answer = complete(client, extra_body={"response_format": asking("command")})
    jsonschema.validate(json.loads(answer.choices[0].text), SCHEMA)
    assert answer.choices[0].finish_reason == "stop"
    with load(demo) as session, closing(session.constraint(files["command"])) as constraint:
        text = "".join(generate_text(session, PROMPTS[0], TOKENS, constraint=constraint))
    assert answer.choices[0].text == text


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_takes_openai_s_response_format_with_the_schema_that_was_compiled(
    client: openai.OpenAI, stream: bool
) -> None:
    for temperature in (0, 1.5):
        answer = client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "read()"}], max_tokens=TOKENS,
            temperature=temperature, seed=3, response_format=asking("command", SCHEMA),
            stream=stream,
        )  # fmt: skip
        text = (
            "".join(event.choices[0].delta.content or "" for event in answer if event.choices)
            if stream
            else answer.choices[0].message.content
        )
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    ("response_format", "more", "message"),
    [
        (asking("other"), {}, 'json_schema.name "other" is no constraint of this server'),
        (asking("command", {**SCHEMA, "required": []}), {}, "is not the one that was compiled"),
        (asking("command"), {"max_tokens": 3}, "at least"),
        ({"type": "grammar"}, {}, "must be text or json_schema"),
    ],
)
def test_what_was_not_compiled_is_refused_by_name(
    client: openai.OpenAI, response_format: Any, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        complete(client, extra_body={"response_format": response_format}, **more)
    assert caught.value.param == ("max_tokens" if more else "response_format")


def test_choices_are_chosen_and_biases_choose(client: openai.OpenAI, demo: Path) -> None:
    with load(demo) as session:
        first = {word: session.tokenizer.encode(word).ids[0] for word in ("yes", "no")}
    for word, token in first.items():
        answer = complete(
            client, logit_bias={str(token): 100}, extra_body={"response_format": asking("answer")}
        )
        assert answer.choices[0].text == word


def test_penalties_and_biases_give_the_text_that_python_gives(
    client: openai.OpenAI, demo: Path
) -> None:
    penalties: dict[str, Any] = {"presence_penalty": 0.75, "frequency_penalty": 1.25}
    with load(demo) as session:
        texts = ["".join(generate_text(session, PROMPTS[1], TOKENS))]
        likeliest = session.tokenizer.encode(texts[0]).ids[0]
        session.reset()
        texts.append("".join(generate_text(session, PROMPTS[1], TOKENS, **penalties)))
        session.reset()
        bias = {likeliest: -100.0, 300: 4.5}
        texts.append("".join(generate_text(session, PROMPTS[1], TOKENS, logit_bias=bias)))
    biased = {str(token): value for token, value in bias.items()}
    given = [{}, penalties, {"logit_bias": biased}]
    assert [complete(client, PROMPTS[1], **g).choices[0].text for g in given] == texts
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    ("option", "message"),
    [("x", "must be NAME=FILE"), ("x=/no/file", "cannot open"), ("x={manifest}", "not a compiled")],
)
def test_a_constraint_that_cannot_be_used_is_said_at_the_start(
    program: Path, demo: Path, option: str, message: str
) -> None:
    given = option.format(manifest=demo / "manifest.json")
    result = subprocess.run(
        [program, demo, "--port", "0", "--constraint", given], capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert result.returncode == 1 and message in result.stderr
