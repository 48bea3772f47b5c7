"""A chat template taken apart writes the same prompts; where that cannot be, it says why."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jinja2
import pytest

from slmtvm.errors import InvalidModelError
from slmtvm.text.chat import ChatTemplate, compile_chat, find_chat_template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
_TURN = "{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}"
_ANSWER = "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
TEMPLATES = {
    "turns": "{% for m in messages %}" + _TURN + "{% endfor %}" + _ANSWER,
    # A system message of its own where none is given.
    "default system": "{% if messages[0].role != 'system' %}{{ '<|system|>\\nBe good.<|end|>\\n' }}"
    "{% endif %}{% for m in messages %}" + _TURN + "{% endfor %}" + _ANSWER,
    # No system, texts stripped, another name for the assistant, strict order.
    "stripped": "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<turn>' + role + '\\n' + (m.content | trim) + '</turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}",
    # The system's text inside the user's first turn.
    "merged system": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{% if not loop.first or loop.last %}{{ raise_exception('only first') }}{% endif %}"
    "{{ '[INST] <<' + m.content + '>>\\n' }}"
    "{% elif m.role == 'user' %}"
    "{% if not loop.first and loop.previtem.role == 'system' %}{{ m.content + ' [/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
}


def rendered(source: str, messages: list[dict[str, str]]) -> str | None:
    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source).render(
            messages=messages, add_generation_prompt=True, **TOKENS
        )
    except jinja2.TemplateError:
        return None


def conversations(count: int) -> list[list[dict[str, str]]]:
    r = random.Random(5)
    letters = "ab \n\t<|>é🐍\u3000\u00a0"
    return [
        [
            {
                "role": r.choice(("system", "user", "assistant", "user")),
                "content": "".join(r.choice(letters) for _ in range(r.randrange(12))),
            }
            for _ in range(r.randrange(1, 7))
        ]
        for _ in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_pieces_write_what_the_template_writes(name: str) -> None:
    pieces = compile_chat(ChatTemplate(TEMPLATES[name], TOKENS))
    assert pieces.reason is None
    taken = 0
    for messages in conversations(400):
        made = pieces.text(messages)
        if made is not None:
            assert made == rendered(TEMPLATES[name], messages)
            taken += 1
    assert taken > 20
    asked = [{"role": "user", "content": "x"}]
    assert pieces.text(asked) == rendered(TEMPLATES[name], asked)


def test_what_a_template_does_with_a_word_of_its_own_is_refused_by_that_word() -> None:
    source = TEMPLATES["turns"].replace("m['content']", "m['content'].split('</think>')[-1]")
    pieces = compile_chat(ChatTemplate(source, TOKENS))
    assert pieces.reason is None
    assert set(pieces.plain.refused) == {"system", "user", "assistant"}
    assert all(words == ("</think>",) for words in pieces.plain.refused.values())


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ strftime_now('%d') | upper }}" + TEMPLATES["turns"], "the date in a form of its own"),
        ("{{ now() }}" + TEMPLATES["turns"], "writes the date"),
        ("{% for m in messages %", "is no jinja2 template"),
        ("{{ raise_exception('no') }}", "the texts of no conversation"),
        ("nothing of them", "the texts of no conversation"),
        (
            "{{ messages | length }}" + TEMPLATES["turns"],
            "between the start and system depends on more",
        ),
        (TEMPLATES["turns"].replace("m['content']", "m['content'] * 2"), "once, in their order"),
        (TEMPLATES["turns"].replace("m['content']", "m['content'][:30]"), "is not the sum"),
    ],
)
def test_a_template_that_does_more_is_said_to(source: str, reason: str) -> None:
    pieces = compile_chat(ChatTemplate(source, TOKENS))
    assert pieces.reason is not None and reason in pieces.reason
    assert not pieces.plain.between


def test_a_template_is_found_where_exporters_write_it(tmp_path: Path) -> None:
    model = tmp_path / "onnx" / "model.onnx"
    model.parent.mkdir()
    assert find_chat_template(model) is None
    settings = {
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "yes"},
        ],
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "pad_token": None,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert find_chat_template(model) == ChatTemplate("yes", TOKENS)
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert find_chat_template(model) == ChatTemplate("newer", TOKENS)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InvalidModelError, match=r"tokenizer_config\.json: is no JSON"):
        find_chat_template(model)
