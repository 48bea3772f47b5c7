"""What a chat template writes between the items of a conversation: chat.json, and prompts by it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from slmtvm.errors import SlmError
from slmtvm.text.chat.calls import CallSyntax
from slmtvm.text.chat.items import EDGE, TEXTS, TOOLS, Item, Message, Tool, items_of
from slmtvm.text.chat.template import ChatTemplate, NotSeparableError, now, renderer

TRIMMED, QUOTED = "trimmed", "quoted"
# A form of strftime between two private characters stands in pieces for the time.
CLOCK, CLOCK_END = "\ue003", "\ue004"


@dataclass(frozen=True)
class Table:
    """``between[a][b]`` stands between items of the kinds a and b.

    EDGE stands for the start and the end; what is behind the last item begins an answer. ``forms``
    say how values are written. Of texts: as they are; TRIMMED, without the white space around
    them; or QUOTED, as a string of JSON. Of JSON: ``indent`` of json.dumps (None: one line), of
    tools also whether all of one, or its function. ``refused``: by kind texts that the template
    treats in a way of its own.
    """

    between: dict[str, dict[str, str]] = field(default_factory=dict)
    forms: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def text(self, items: Sequence[Item]) -> str | None:
        """What is written of ``items``; None where the template takes none of this order.

        The time is left as it stands in the pieces.
        """
        parts = []
        kinds = [EDGE, *(item.kind for item in items), EDGE]
        values = [*(written(item, self.forms.get(item.kind)) for item in items), ""]
        for (before, after), value in zip(itertools.pairwise(kinds), values, strict=True):
            piece = self.between.get(before, {}).get(after)
            if piece is None:
                return None
            parts += [piece, value]
        return "".join(parts)

    def takes(self, items: Sequence[Item]) -> bool:
        """Whether no text has what the template treats in a way of its own."""
        return not any(
            word in item.value
            for item in items
            if item.kind in TEXTS
            for word in self.refused.get(item.kind, ())
        )

    def to_json(self) -> dict[str, Any]:
        """The fields that codegen/programs/shared_chat.c reads."""
        return {
            "between": self.between,
            "forms": self.forms,
            "refused": {kind: list(texts) for kind, texts in self.refused.items()},
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Table:
        """What ``to_json`` gave."""
        refused = {str(kind): tuple(texts) for kind, texts in fields["refused"].items()}
        return cls(fields["between"], dict(fields["forms"]), refused)


def written(item: Item, form: Any) -> str:
    """An item's value in one of the forms that ``Table`` names."""
    if item.kind == TOOLS:
        value = item.value if form["whole"] else item.value["function"]
        return json.dumps(value, ensure_ascii=False, indent=form["indent"])
    if not isinstance(item.value, str):
        return json.dumps(item.value, ensure_ascii=False, indent=form["indent"])
    if form == TRIMMED:
        return item.value.strip()
    return json.dumps(item.value, ensure_ascii=False) if form == QUOTED else item.value


@dataclass(frozen=True)
class ChatPieces:
    """A template taken apart: ``plain`` without tools, ``offering`` where tools may be called.

    Where it cannot be taken apart ``reason`` says why, ``tools_reason`` why not with tools.
    ``calls``: how the model writes calls, where that can be read. ``template``: what they were
    made of, for whoever has jinja2.
    """

    plain: Table = field(default_factory=Table)
    offering: Table | None = None
    calls: CallSyntax | None = None
    reason: str | None = None
    tools_reason: str | None = None
    template: ChatTemplate | None = None

    @property
    def names_tools(self) -> bool:
        """Whether the template does anything with tools."""
        return self.template is not None and "tool" in self.template.source

    def text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        clock: Callable[[str], str] = now,
    ) -> str | None:
        """The prompt of a conversation; None where the template takes none of this order."""
        table = self.offering if tools else self.plain
        text = None if table is None else table.text(items_of(messages, tools))
        return None if text is None else _with_time(text, clock)

    def to_json(self) -> bytes:
        """chat.json: what codegen/programs/shared_chat.c reads, and the template for jinja2."""
        fields = {
            **self.plain.to_json(),
            "offering": None if self.offering is None else self.offering.to_json(),
            "calls": None if self.calls is None else asdict(self.calls),
            "reason": self.reason,
            "tools_reason": self.tools_reason,
        }
        if self.template is not None:
            fields["template"] = asdict(self.template)
        return (json.dumps(fields, sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, text: str) -> ChatPieces:
        """What ``to_json`` wrote; raises ValueError, TypeError or KeyError where it is not that."""
        fields = json.loads(text)
        template, offering, calls = (fields.get(n) for n in ("template", "offering", "calls"))
        return cls(
            Table.from_json(fields),
            None if offering is None else Table.from_json(offering),
            None if calls is None else CallSyntax(**calls),
            fields["reason"],
            fields["tools_reason"],
            None
            if template is None
            else ChatTemplate(template["source"], dict(template["tokens"])),
        )

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The prompt of a conversation, by jinja2 where the pieces do not serve.

        Raises SlmError where the template does not take it, or jinja2 is needed and missing.
        """
        order = ", ".join(m["role"] for m in messages)
        table = self.offering if tools else self.plain
        if self.reason is None and table is not None and table.takes(items_of(messages, tools)):
            text = self.text(messages, tools)
            if text is None:
                raise SlmError(
                    f"the model's chat template takes no messages in this order: {order}"
                )
            return text
        if self.template is None:
            raise SlmError("the bundle has no chat template that takes this: compile it again")
        try:
            return renderer(self.template)(messages, tools)
        except NotSeparableError as error:
            raise SlmError(f"the model's chat template: {error}") from error
        except SlmError:
            raise
        except Exception as error:  # a template is a program: it fails in every way
            raise SlmError(f"the model's chat template refuses {order}: {error}") from error


def _with_time(text: str, clock: Callable[[str], str]) -> str:
    return re.sub(f"{CLOCK}([^{CLOCK_END}]*){CLOCK_END}", lambda form: clock(form[1]), text)
