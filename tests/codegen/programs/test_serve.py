"""slm-serve lists its model, turns texts into tokens and back, and says what is wrong."""

from __future__ import annotations

import http.client
import json
import random
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest

from slmtvm.runtime import load
from tests.codegen.programs.hostile import any_body, any_text
from tests.codegen.programs.serving import Server
from tests.end_to_end.bundles import CONTEXT

pytestmark = pytest.mark.slow


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["pycode"]
    assert client.models.retrieve("pycode").id == "pycode"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"model": "other"}, openai.NotFoundError, "there is no such model"),
        ({"prompt": ""}, openai.BadRequestError, "prompt is empty"),
        ({"prompt": "x " * 400}, openai.BadRequestError, f"context is {CONTEXT} tokens"),
        ({"prompt": "x " * 60_000}, openai.BadRequestError, "longer than"),
        ({"prompt": [5000]}, openai.BadRequestError, "5000 is no token"),
        ({"prompt": ["a", "b"]}, openai.BadRequestError, "one prompt a request"),
        ({"temperature": -1}, openai.BadRequestError, "temperature must be a number from 0"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens must be"),
        ({"n": 2}, openai.BadRequestError, "n must be 1"),
        ({"logit_bias": {"5": 101}}, openai.BadRequestError, "logit_bias of token 5 must be"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, 'logit_bias: "x" is no token'),
        ({"presence_penalty": 3}, openai.BadRequestError, "presence_penalty must be a number"),
        ({"frequency_penalty": -2.1}, openai.BadRequestError, "frequency_penalty must be a number"),
        (
            {"extra_body": {"response_format": {"type": "json_object"}}},
            openai.BadRequestError,
            "response_format.type must be text or json_schema",
        ),
        ({"stop": [""]}, openai.BadRequestError, "stop must be strings"),
        ({"stop": ["x"] * 9}, openai.BadRequestError, "more than 8"),
    ],
)
def test_what_is_wrong_is_said_as_openai_says_it(
    client: openai.OpenAI, more: dict[str, Any], error: type[openai.APIStatusError], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        client.completions.create(**{"model": "pycode", "prompt": "x", **more})
    assert raised.value.body["type"] == "invalid_request_error"


def test_chat_and_embeddings_say_that_the_model_has_none(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="no chat template") as raised:
        client.chat.completions.create(model="pycode", messages=[{"role": "user", "content": "x"}])
    assert raised.value.status_code == 501
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model="pycode", input="x")


def test_text_becomes_tokens_and_tokens_text(server: Server, demo: Path) -> None:
    text = "def naïve(x):\n\treturn '🐍' \x00"
    _, told = server.ask("/tokenize", {"content": text})
    with load(demo) as session:
        assert told["tokens"] == session.tokenizer.encode(text).ids
    assert server.ask("/detokenize", {"tokens": told["tokens"]}) == (200, {"content": text})


@pytest.fixture
def raw(server: Server) -> Iterator[http.client.HTTPConnection]:
    """One connection for many requests."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        yield connection


def posted(raw: http.client.HTTPConnection, path: str, content: bytes) -> tuple[int, Any]:
    raw.request("POST", path, content, {"Content-Type": "application/json"})
    answer = raw.getresponse()
    return answer.status, json.loads(answer.read())


def test_strings_are_read_and_written_as_python_reads_and_writes_them(
    raw: http.client.HTTPConnection,
) -> None:
    r = random.Random(3)
    for number in range(150):
        text = any_text(r)[:100]  # so that its tokens fit
        whole = re.sub("[\ud800-\udfff]", "\ufffd", text)  # halves of pairs
        plain = number % 2 == 0
        content = json.dumps({"content": text if plain else whole}, ensure_ascii=plain)
        expected = json.loads(json.dumps(text if plain else whole))
        expected = re.sub("[\ud800-\udfff]", "\ufffd", expected)
        status, told = posted(raw, "/tokenize", content.encode())
        assert status == 200, told
        tokens = json.dumps({"tokens": told["tokens"]}).encode()
        assert posted(raw, "/detokenize", tokens) == (200, {"content": expected})


def test_a_body_is_json_where_python_says_so(raw: http.client.HTTPConnection) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(constant)  # NaN is none

    r = random.Random(8)
    seen = {True: 0, False: 0}
    for _ in range(400):
        content = any_body(r)
        if len(content) > 100_000 or content.count(b"[") + content.count(b"{") > 30:
            continue  # what is too long or too deep is refused, too
        try:
            sound = isinstance(json.loads(content.decode(), parse_constant=refuse), dict)
        except ValueError:
            sound = False
        _, answer = posted(raw, "/v1/chat/completions", content)
        said = answer.get("error", {}).get("message", "")
        assert said.startswith("the body is no JSON") != sound, (content, said)
        seen[sound] += 1
    assert min(seen.values()) > 50
