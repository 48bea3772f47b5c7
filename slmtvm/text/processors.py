"""The post-processor of a tokenizer.json: the tokens that go around one text, or around two."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from slmtvm.errors import UnsupportedTokenizerError
from slmtvm.text.models import Flag
from slmtvm.text.tables import NONE

Settings = dict[str, Any]
FIRST, SECOND = NONE - 1, NONE - 2  # the texts themselves

Template = list[tuple[int, int]]  # (token, FIRST or SECOND; segment)


@dataclass
class Templates:
    single: Template = field(default_factory=lambda: [(FIRST, 0)])
    pair: Template = field(default_factory=lambda: [(FIRST, 0), (SECOND, 1)])
    flags: Flag = Flag(0)  # noqa: RUF009  # TRIM where spans leave spaces out


def templates(settings: Settings | None) -> Templates:
    """What the field "post_processor" says; UnsupportedTokenizerError where not compiled."""
    made = Templates()
    set_already = False
    for part in _parts(settings):
        kind = part.get("type")
        if kind == "ByteLevel":
            if part.get("trim_offsets", True):
                made.flags |= _trim(part)
            continue
        if set_already:
            raise UnsupportedTokenizerError("several post-processors are not compiled")
        set_already = True
        if kind == "TemplateProcessing":
            made.single = _template(part, "single")
            made.pair = _template(part, "pair")
        elif kind in ("BertProcessing", "RobertaProcessing"):
            _bert_like(part, made, double=kind == "RobertaProcessing")
        else:
            raise UnsupportedTokenizerError(f"the post-processor {kind} is not compiled")
    return made


def _parts(settings: Settings | None) -> list[Settings]:
    if settings is None:
        return []
    if settings.get("type") == "Sequence":
        return [part for inner in settings["processors"] for part in _parts(inner)]
    return [settings]


def _trim(part: Settings) -> Flag:
    return Flag.TRIM | (Flag.TRIM_PREFIXED if part.get("add_prefix_space", True) else Flag(0))


def _template(part: Settings, name: str) -> Template:
    made: Template = []
    for piece in part[name]:
        if text := piece.get("Sequence"):
            made.append((FIRST if text["id"] == "A" else SECOND, text["type_id"]))
        else:
            special = piece["SpecialToken"]
            ids = part["special_tokens"][special["id"]]["ids"]
            made += [(id_, special["type_id"]) for id_ in ids]
    if any(segment not in (0, 1) for _, segment in made):
        raise UnsupportedTokenizerError("a template with segments beside 0 and 1 is not compiled")
    return made


def _bert_like(part: Settings, made: Templates, double: bool) -> None:
    """BERT's tokens around texts; RoBERTa puts two between them, and has one segment."""
    start, end = part["cls"][1], part["sep"][1]
    made.single = [(start, 0), (FIRST, 0), (end, 0)]
    if double:
        made.pair = [*made.single, (end, 0), (SECOND, 0), (end, 0)]
        if part.get("trim_offsets", True):
            made.flags |= _trim(part)
    else:
        made.pair = [*made.single, (SECOND, 1), (end, 1)]
