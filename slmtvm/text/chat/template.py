"""The chat template that lies beside a model, and jinja2 that runs it as transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from slmtvm.errors import InvalidModelError, SlmError
from slmtvm.files import read_text
from slmtvm.text.chat.items import Message, Tool
from slmtvm.text.find import model_folders

_MAX_BYTES = 1 << 20
_DEFAULT = "default"

Render = Callable[[Sequence[Message], Sequence[Tool]], str]


class NotSeparableError(Exception):
    """Why a template is not compiled."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template as it lies beside a model, and the texts of tokens that it may name."""

    source: str
    tokens: dict[str, str]  # bos_token, eos_token, ...


def find_chat_template(model: str | Path) -> ChatTemplate | None:
    """The template beside the ONNX file ``model``; None where there is none.

    chat_template.jinja, or the field chat_template of tokenizer_config.json: of several the one
    called "default". Raises InvalidModelError where a file is no JSON.
    """
    for folder in model_folders(model):
        settings = _settings(folder / "tokenizer_config.json")
        alone = folder / "chat_template.jinja"
        found = settings.get("chat_template")
        if isinstance(found, list):  # named ones
            named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get(_DEFAULT)
        source = read_text(alone, _MAX_BYTES, InvalidModelError) if alone.is_file() else found
        if isinstance(source, str):
            return ChatTemplate(source, dict(_tokens(settings)))
    return None


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        fields = json.loads(read_text(path, 16 << 20, InvalidModelError))
    except (ValueError, RecursionError) as error:
        raise InvalidModelError(
            f"is no JSON: {error}; mend it, or take it out of the model's folder", where=str(path)
        ) from error
    return fields if isinstance(fields, dict) else {}


def _tokens(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            yield name, text


def now(form: str) -> str:
    """The local time by a form of strftime."""
    return datetime.now().strftime(form)


def renderer(template: ChatTemplate, clock: Callable[[str], str] = now) -> Render:
    """The template as transformers runs it; ``clock`` says what it gets for a form of strftime.

    Raises NotSeparableError where it is none, SlmError where jinja2 is missing.
    """
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise SlmError("the model has a chat template: pip install jinja2 to use it") from error

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: object, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = clock
    try:
        compiled = environment.from_string(template.source)
    except TemplateError as error:
        raise NotSeparableError(f"it is no jinja2 template: {error}") from error

    def render(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        return compiled.render(
            messages=list(messages), add_generation_prompt=True, tools=list(tools) or None,
            documents=None, **template.tokens,
        )  # fmt: skip

    return render


def rendered(render: Render, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str | None:
    """The template's text; None where it refuses the conversation, or fails."""
    try:
        return render(messages, tools)
    except Exception:  # a template is a program: it fails in every way
        return None
