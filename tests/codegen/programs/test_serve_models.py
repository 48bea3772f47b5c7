"""slm-serve with models of other kinds: embeddings, and chat by a template beside the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import openai
import pytest

from slmtvm.bundle import Bundle
from slmtvm.compiler import compile_model
from slmtvm.runtime import load
from slmtvm.runtime.serving import server_program
from slmtvm.runtime.tasks import classify, embed
from slmtvm.runtime.text import generate_text
from slmtvm.text.chat import ChatTemplate, compile_chat
from tests.codegen.programs.serving import CHAT_TEMPLATE, client_of, save_words, serving
from tests.importer.heads import DECODERS, ENCODERS, save_head
from tests.models.corpus import corpus_path

pytestmark = pytest.mark.slow
TOKENS = 24


@pytest.mark.parametrize("head", ["mean_embedding", "pooler"])
def test_embeddings_are_those_of_a_session(head: str, tmp_path: Path) -> None:
    model = save_head(ENCODERS[head], tmp_path)
    save_words(tmp_path)
    modules = [{"type": f"models.{kind}", "path": kind} for kind in ("Pooling", "Normalize")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "Pooling").mkdir()
    settings = {"pooling_mode_mean_tokens": True}
    (tmp_path / "Pooling" / "config.json").write_text(json.dumps(settings))
    bundle = tmp_path / "words.slm"
    compile_model(model, output=bundle)
    texts = ["w1 w2 w3", "w9", "w4 w4 w5 w6 w7"]
    with load(bundle) as session:
        expected = [embed(session, text).values for text in texts]
        tokens = sum(len(session.tokenizer.encode(text).ids) for text in texts)
        ids = session.tokenizer.encode(texts[0]).ids
    with serving(server_program(bundle), bundle) as server, client_of(server) as client:
        # The client asks for base64, and turns it into numbers.
        answer = client.embeddings.create(model="words", input=texts)
        np.testing.assert_allclose([d.embedding for d in answer.data], expected, rtol=1e-6)
        assert [d.index for d in answer.data] == [0, 1, 2]
        assert answer.usage.prompt_tokens == tokens
        for one in (texts[0], ids, [ids]):
            answer = client.embeddings.create(model="words", input=one, encoding_format="float")
            np.testing.assert_allclose(answer.data[0].embedding, expected[0], rtol=1e-6)
        many = client.embeddings.create(model="words", input=texts * 300)  # more than its buffer
        assert len(many.data) == 900
        np.testing.assert_array_equal(many.data[899].embedding, many.data[2].embedding)
        for wrong, message in (([], "input is empty"), (["w1", "w1 " * 9999], "an input has")):
            with pytest.raises(openai.BadRequestError, match=message):
                client.embeddings.create(model="words", input=wrong)
        with pytest.raises(openai.BadRequestError, match="writes no text"):
            client.completions.create(model="words", prompt="w1")


def test_labels_are_those_of_a_session(tmp_path: Path) -> None:
    model = save_head(ENCODERS["classifier"], tmp_path)
    save_words(tmp_path)
    labels = {"0": "bad", "1": 'so "so"', "2": "good"}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
    bundle = tmp_path / "words.slm"
    compile_model(model, output=bundle)
    texts = ["w1 w2 w3", "w9", "w4 w4 w5 w6 w7"]
    with load(bundle) as session:
        expected = [classify(session, text) for text in texts]
    with serving(server_program(bundle), bundle) as server:
        status, answer = server.ask("/v1/classify", {"input": texts})
        assert status == 200
        for told, wanted in zip(answer["data"], expected, strict=True):
            assert told["label"] == wanted[0].label and told["num_classes"] == 3
            probabilities = dict(zip(labels.values(), told["probs"], strict=True))
            assert probabilities == pytest.approx({w.label: w.score for w in wanted}, rel=1e-5)
        assert server.ask("/v1/embeddings", {"input": texts})[0] == 400


def test_an_encoder_decoder_reads_its_prompt_as_a_source(tmp_path: Path) -> None:
    bundle = tmp_path / "t5.slm"
    model = corpus_path("t5-optimum", "decoder_model.onnx")
    compile_model(model, output=bundle, context=40, check=False)
    sources = [[5, 6, 7, 8], [5, 6, 7, 9, 3]]
    expected = []
    with load(bundle) as session:
        for source in sources:
            session.reset()
            session.encode(source)
            start, stop = int(session.info["start"] or 0), frozenset(session.info["end"])
            expected.append(list(session.generate([start], 12, stop=stop)))
    ask = {"max_tokens": 12, "temperature": 0, "return_token_ids": True}
    with serving(server_program(bundle), bundle, ["--sessions", "1"]) as server:
        for source, tokens in zip(sources, expected, strict=True):
            status, answer = server.ask("/v1/completions", {"prompt": source, **ask})
            assert status == 200, answer
            assert answer["choices"][0]["token_ids"] == tokens
            assert answer["usage"]["prompt_tokens"] == len(source)
        # No tokenizer lies beside this model.
        status, answer = server.ask("/v1/completions", {"prompt": "x"})
        assert (status, answer["error"]["code"]) == (501, "no_tokenizer")


@pytest.fixture(scope="module")
def chat(program: Path, chat_bundle: Path) -> Iterator[openai.OpenAI]:
    with serving(program, chat_bundle) as server, client_of(server) as client:
        yield client


def ask(client: openai.OpenAI, messages: list[dict[str, Any]], **more: Any) -> Any:
    given = {"temperature": 0, "max_tokens": TOKENS, **more}
    return client.chat.completions.create(model="chat", messages=messages, **given)


CONVERSATION = [
    {"role": "system", "content": "Files."},
    {"role": "user", "content": " read_file(path)\n"},
    {"role": "assistant", "content": '    """Read."""'},
    {"role": "user", "content": "write_file(päth, '🐍')"},
]


@pytest.fixture(scope="module")
def answer(demo: Path) -> str:
    """What a session writes after the conversation as jinja2 writes it."""
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    prompt = template.render(messages=CONVERSATION, add_generation_prompt=True)
    with load(demo) as session:
        return "".join(generate_text(session, prompt, TOKENS))


def test_a_conversation_is_answered_as_its_template_writes_it(
    chat: openai.OpenAI, answer: str
) -> None:
    told = ask(chat, CONVERSATION, logprobs=True, top_logprobs=2)
    assert told.choices[0].message.role == "assistant"
    assert told.choices[0].message.content == answer
    logprobs = told.choices[0].logprobs.content
    assert len(logprobs) == TOKENS and len(logprobs[0].top_logprobs) == 2
    assert bytes(logprobs[3].bytes).decode() == logprobs[3].token


def test_a_conversation_may_be_streamed_and_its_texts_be_parts(
    chat: openai.OpenAI, answer: str
) -> None:
    messages = [
        {"role": "developer", "content": "Files."},
        *CONVERSATION[1:3],
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "write_file(päth"},
                {"type": "text", "text": ", '🐍')"},
            ],
        },
    ]
    events = list(ask(chat, messages, stream=True, max_completion_tokens=TOKENS))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == answer
    assert events[-1].choices[0].finish_reason == "length"


def test_the_next_turn_computes_what_is_new_alone(chat: openai.OpenAI, answer: str) -> None:
    ask(chat, CONVERSATION)
    more = [{"role": "assistant", "content": answer}, {"role": "user", "content": "f()"}]
    usage = ask(chat, [*CONVERSATION, *more]).usage
    assert usage.prompt_tokens_details.cached_tokens > usage.prompt_tokens // 2


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "one or more"),
        ([{"role": "tool", "content": "x"}], 'no message of "tool" at the beginning'),
        ([{"role": "user"}], "a message has no content"),
        ([{"content": "x"}], "a message has no role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "text alone"),
        ([{"role": "user", "content": "x" * 200_000}], "longer than"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_said(
    chat: openai.OpenAI, messages: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(chat, messages)


def test_a_template_that_is_not_compiled_says_why(
    program: Path, chat_bundle: Path, demo: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "dated.slm"
    bundle.mkdir()
    for file in demo.iterdir():
        (bundle / file.name).symlink_to(file)
    pieces = compile_chat(ChatTemplate("{{ now() }}", {}))
    (bundle / "chat.json").write_bytes(pieces.to_json())
    with serving(program, bundle) as server:
        asked = {"messages": [{"role": "user", "content": "x"}]}
        status, said = server.ask("/v1/chat/completions", asked)
    assert status == 501 and "it writes the date (now)" in said["error"]["message"]


def test_the_template_beside_a_model_comes_into_its_bundle(tmp_path: Path) -> None:
    model = save_head(DECODERS["last_logits"], tmp_path)
    save_words(tmp_path)
    settings = {"chat_template": "{% for m in messages %}{{ m.content }} w9 {% endfor %}w8"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    bundle = compile_model(model, output=tmp_path / "words.slm")
    assert bundle.manifest.chat is not None
    Bundle.open(bundle.path).verify()
    with serving(server_program(bundle.path), bundle.path) as server:
        asked = {"messages": [{"role": "user", "content": "w1"}], "max_tokens": 3, "seed": 1}
        status, said = server.ask("/v1/chat/completions", asked)
        assert status == 200 and said["usage"]["prompt_tokens"] == 3  # w1 w9 w8
        _, plain = server.ask("/v1/completions", {"prompt": [1, 9, 8], "max_tokens": 3, "seed": 1})
        assert plain["choices"][0]["text"] == said["choices"][0]["message"]["content"]
