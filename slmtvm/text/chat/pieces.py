"""A model's chat template compiled to what stands between messages, for devices without jinja2.

A template is a program in jinja2. Most write, of each message, its text between strings that depend
on the roles of the message and of the one before alone. That is found out by running the template
on conversations of marks, and checked on random ones; a template that does more is not compiled.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from slmtvm.errors import InvalidModelError, SlmError
from slmtvm.files import read_text
from slmtvm.text.find import model_folders

ROLES = ("system", "user", "assistant")
EDGE = ""  # the role of what is before the first message, and behind the last
_MAX_BYTES = 1 << 20
_PROBED_MESSAGES = 4
_RANDOM_CONVERSATIONS = 1000
_RANDOM_MESSAGES = 9
_LONGEST_LITERAL = 120  # bytes; `own` of codegen/programs/shared_chat.c
_DATES = ("strftime_now", "now(")
_DEFAULT = "default"

Message = dict[str, str]
Render = Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class ChatTemplate:
    """A template as it lies beside a model, and the texts of tokens that it may name."""

    source: str
    tokens: dict[str, str]  # bos_token, eos_token, ...


@dataclass(frozen=True)
class ChatPieces:
    """What a template writes: ``between[a][b]`` between messages of the roles a and b.

    EDGE stands for the start and the end; what is behind the last message begins an answer.
    ``trims``: roles whose texts lose the white space around them. ``refused``: by role texts that
    the template treats in a way of its own. Where it cannot be taken apart ``reason`` says why.
    ``template``: what they were made of, for whoever has jinja2.
    """

    between: dict[str, dict[str, str]] = field(default_factory=dict)
    trims: tuple[str, ...] = ()
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reason: str | None = None
    template: ChatTemplate | None = None

    def text(self, messages: Sequence[Message]) -> str | None:
        """The prompt of a conversation; None where the template takes none of this order."""
        roles = [EDGE, *(m["role"] for m in messages), EDGE]
        contents = [
            m["content"].strip() if m["role"] in self.trims else m["content"] for m in messages
        ]
        parts = []
        for (before, after), content in zip(
            itertools.pairwise(roles), [*contents, ""], strict=True
        ):
            piece = self.between.get(before, {}).get(after)
            if piece is None:
                return None
            parts += [piece, content]
        return "".join(parts)

    def to_json(self) -> bytes:
        """chat.json: what codegen/programs/shared_chat.c reads, and the template for jinja2."""
        fields = {
            "between": self.between,
            "trims": list(self.trims),
            "refused": {role: list(texts) for role, texts in self.refused.items()},
            "reason": self.reason,
        }
        if self.template is not None:
            fields["template"] = asdict(self.template)
        return (json.dumps(fields, sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, text: str) -> ChatPieces:
        """What ``to_json`` wrote; raises ValueError, TypeError or KeyError where it is not that."""
        fields = json.loads(text)
        given = fields.get("template")
        refused = {str(role): tuple(texts) for role, texts in fields["refused"].items()}
        template = None if given is None else ChatTemplate(given["source"], dict(given["tokens"]))
        return cls(fields["between"], tuple(fields["trims"]), refused, fields["reason"], template)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation, by jinja2 where the pieces do not serve.

        Raises SlmError where the template does not take it, or jinja2 is needed and missing.
        """
        order = ", ".join(m["role"] for m in messages)
        refused = any(t in m["content"] for m in messages for t in self.refused.get(m["role"], ()))
        if self.reason is None and not refused:
            text = self.text(messages)
            if text is None:
                raise SlmError(
                    f"the model's chat template takes no messages in this order: {order}"
                )
            return text
        if self.template is None:
            raise SlmError("the bundle has no chat template that takes this: compile it again")
        try:
            return _renderer(self.template)(messages)
        except _NotSeparableError as error:
            raise SlmError(f"the model's chat template: {error}") from error
        except SlmError:
            raise
        except Exception as error:  # a template is a program: it fails in every way
            raise SlmError(f"the model's chat template refuses {order}: {error}") from error


class _NotSeparableError(Exception):
    """Why a template is not compiled."""


def chat_pieces(model: str | Path) -> ChatPieces | None:
    """The pieces of the template beside the ONNX file ``model``; None where there is none.

    Raises as ``find_chat_template`` and ``compile_chat`` do.
    """
    template = find_chat_template(model)
    return None if template is None else compile_chat(template)


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


def compile_chat(template: ChatTemplate) -> ChatPieces:
    """The pieces of a template; with ``reason`` where it cannot be taken apart exactly.

    Raises SlmError where jinja2 is missing.
    """
    try:
        if date := next((name for name in _DATES if name in template.source), None):
            raise _NotSeparableError(f"it writes the date ({date})")
        render = _renderer(template)
        between, trims = _probe(render)
        refused = _refused(render, ChatPieces(between, trims), _literals(template.source))
        pieces = ChatPieces(between, trims, refused, template=template)
        _check(render, pieces)
        return pieces
    except _NotSeparableError as error:
        return ChatPieces(reason=str(error), template=template)


def _renderer(template: ChatTemplate) -> Render:
    """The template as transformers runs it; raises _NotSeparableError where it is none."""
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise SlmError("the model has a chat template: pip install jinja2 to use it") from error

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: object, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        compiled = environment.from_string(template.source)
    except TemplateError as error:
        raise _NotSeparableError(f"it is no jinja2 template: {error}") from error

    def render(messages: Sequence[Message]) -> str:
        return compiled.render(
            messages=list(messages), add_generation_prompt=True, tools=None, documents=None,
            **template.tokens,
        )  # fmt: skip

    return render


def _rendered(render: Render, messages: Sequence[Message]) -> str | None:
    """The template's text; None where it refuses the conversation, or fails."""
    try:
        return render(messages)
    except Exception:  # a template is a program: it fails in every way
        return None


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"  # private characters, which no template has


def _probe(render: Render) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Pieces by both roles, and the roles whose texts are stripped."""
    between: dict[str, dict[str, str]] = {}
    trims: dict[str, bool] = {}
    for count in range(1, _PROBED_MESSAGES + 1):
        for roles in itertools.product(ROLES, repeat=count):
            messages = [{"role": role, "content": f" {_mark(i)}\n"} for i, role in enumerate(roles)]
            text = _rendered(render, messages)
            if text is not None:
                _take_apart(text, roles, between, trims)
    if not between:
        raise _NotSeparableError("it writes the texts of no conversation")
    if not any(EDGE in after for after in between.values()):
        raise _NotSeparableError("it begins no answer")
    return between, tuple(role for role in ROLES if trims.get(role))


def _take_apart(
    text: str, roles: Sequence[str], between: dict[str, dict[str, str]], trims: dict[str, bool]
) -> None:
    """Learn from a conversation's text; where it leaves a message out, that it is not taken."""
    names = [EDGE, *roles, EDGE]
    if any(text.count(_mark(i)) == 0 for i in range(len(roles))):
        return
    at = 0
    for i, role in enumerate(roles):
        mark, whole = _mark(i), f" {_mark(i)}\n"
        if text.count(mark) != 1 or (place := text.find(mark, at)) < 0:
            raise _NotSeparableError(f"it does not write each text of {role} once, in their order")
        trimmed = text[place - 1 : place - 1 + len(whole)] != whole
        if trims.setdefault(role, trimmed) != trimmed:
            raise _NotSeparableError(f"it strips some texts of {role}, and others not")
        begin = place if trimmed else place - 1
        _set(between, names[i], role, text[at:begin])
        at = begin + len(mark if trimmed else whole)
    _set(between, names[-2], EDGE, text[at:])


def _set(between: dict[str, dict[str, str]], before: str, after: str, piece: str) -> None:
    if between.setdefault(before, {}).setdefault(after, piece) != piece:
        raise _NotSeparableError(
            f"what it writes between {before or 'the start'} and {after or 'the end'} depends on "
            "more than these two"
        )


def _literals(source: str) -> list[str]:
    """The strings that a template's expressions name: what it may look for in a text."""
    from jinja2 import Environment, nodes

    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    found = {c.value for c in tree.find_all(nodes.Const) if isinstance(c.value, str)}
    short = {text for text in found if text.strip() and len(text.encode()) <= _LONGEST_LITERAL}
    return sorted(short - set(ROLES) - {"role", "content"})


def _refused(
    render: Render, pieces: ChatPieces, literals: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """The literals that change more than their place where a text has them."""
    found: dict[str, tuple[str, ...]] = {}
    orders = [
        roles
        for count in (1, 2, 3)
        for roles in itertools.product(ROLES, repeat=count)
        if pieces.text([{"role": r, "content": "x"} for r in roles]) is not None
    ]
    for role in ROLES:
        of_role = [roles for roles in orders if role in roles]
        bad = tuple(
            text for text in literals if not _holds_with(render, pieces, of_role, role, text)
        )
        if bad:
            found[role] = bad
    return found


def _holds_with(
    render: Render, pieces: ChatPieces, orders: Sequence[Sequence[str]], role: str, text: str
) -> bool:
    for content in (text, f"a {text} b"):
        for roles in orders:
            messages = [
                {"role": r, "content": content if r == role else f"text {i}"}
                for i, r in enumerate(roles)
            ]
            if _rendered(render, messages) != pieces.text(messages):
                return False
    return True


def _check(render: Render, pieces: ChatPieces) -> None:
    """Raise _NotSeparableError where a random conversation is not what the pieces make of it."""
    r = random.Random(0)
    for _ in range(_RANDOM_CONVERSATIONS):
        messages = list(_conversation(r, pieces))
        made = pieces.text(messages)
        if made is not None and made != _rendered(render, messages):
            order = ", ".join(message["role"] for message in messages)
            raise _NotSeparableError(f"it is not the sum of its pieces for {order}")


def _conversation(r: random.Random, pieces: ChatPieces) -> Iterator[Message]:
    """Messages in an order that the pieces take."""
    role = EDGE
    for _ in range(r.randrange(1, _RANDOM_MESSAGES + 1)):
        choices = [after for after in pieces.between.get(role, {}) if after != EDGE]
        if not choices:
            return
        role = r.choice(choices)
        content = _content(r)
        if not any(text in content for text in pieces.refused.get(role, ())):
            yield {"role": role, "content": content}
        else:
            yield {"role": role, "content": ""}


def _content(r: random.Random) -> str:
    alphabet = "abc  \n\t<>|[]/{}'\"\\&\u00a0\u3000é漢🐍"
    return "".join(r.choice(alphabet) for _ in range(r.choice((0, 1, 5, 40))))
