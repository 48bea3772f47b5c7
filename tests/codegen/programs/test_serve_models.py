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
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from slmtvm.bundle import Bundle
from slmtvm.compiler import compile_model
from slmtvm.runtime import load
from slmtvm.runtime.serving import server_program
from slmtvm.runtime.tasks import embed
from slmtvm.runtime.text import generate_text
from slmtvm.text.chat import ChatTemplate, compile_chat
from tests.codegen.programs.serving import Server, serving
from tests.importer.heads import DECODERS, ENCODERS, VOCAB, save_head

pytestmark = pytest.mark.slow
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '# ' + m.content + '\n' }}"
    "{% elif m.role == 'user' %}{{ 'def ' + m.content | trim + ':\n' }}"
    "{% else %}{{ m.content + '\n\n\n' }}{% endif %}{% endfor %}"
    '{% if add_generation_prompt %}{{ \'    """\' }}{% endif %}'
)
TOKENS = 24


def save_words(folder: Path) -> None:
    """A tokenizer of words w0, w1, ... between two special tokens."""
    words = {f"w{i}": i for i in range(VOCAB - 2)} | {"[CLS]": VOCAB - 2, "[SEP]": VOCAB - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", VOCAB - 2), ("[SEP]", VOCAB - 1)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def client_of(server: Server) -> openai.OpenAI:
    base = f"http://127.0.0.1:{server.port}/v1"
    return openai.OpenAI(base_url=base, api_key="none", max_retries=0)


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
    with serving(server_program(bundle), bundle) as server:
        client = client_of(server)
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


@pytest.fixture(scope="module")
def chat_bundle(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's bundle with a chat template, as if one lay beside the model."""
    bundle = tmp_path_factory.mktemp("chat") / "chat.slm"
    bundle.mkdir()
    for file in demo.iterdir():
        (bundle / file.name).symlink_to(file)
    pieces = compile_chat(ChatTemplate(TEMPLATE, {}))
    assert pieces.reason is None
    (bundle / "chat.json").write_bytes(pieces.to_json())
    return bundle


@pytest.fixture(scope="module")
def chat(program: Path, chat_bundle: Path) -> Iterator[openai.OpenAI]:
    with serving(program, chat_bundle) as server:
        yield client_of(server)


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
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
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
    pieces = compile_chat(ChatTemplate("{{ strftime_now('%d') }}", {}))
    (bundle / "chat.json").write_bytes(pieces.to_json())
    with serving(program, bundle) as server:
        asked = {"messages": [{"role": "user", "content": "x"}]}
        status, said = server.ask("/v1/chat/completions", asked)
    assert status == 501 and "it writes the date (strftime_now)" in said["error"]["message"]


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
