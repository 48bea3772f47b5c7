"""Compile what a bundle's model may write: a JSON schema, choices, a regex, or a tool's call."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmtvm.bundle import Bundle
from slmtvm.errors import ConstraintError, SlmError
from slmtvm.text.chat import Tool
from slmtvm.text.constraint import CompiledConstraint, compile_constraint, schema_regex
from slmtvm.text.end_marks import END_MARKS

_NOTHING = {"type": "object", "additionalProperties": False}  # of a tool without parameters
_NAME = re.compile("[a-zA-Z0-9_-]{1,64}")  # a function's, as slm-serve takes it


def constrain(
    bundle: str | Path | Bundle,
    *,
    json_schema: Any = None,
    choices: Sequence[str] | None = None,
    regex: str | None = None,
    tools: Sequence[Tool] | None = None,
    tool: str | None = None,
    output: str | Path | None = None,
) -> CompiledConstraint:
    """Tables of the tokens that may follow, for the bundle's tokenizer: a device follows them.

    One of: ``json_schema``, a schema as json.load gives it (2020-12; true: any JSON); ``choices``,
    texts of which one is written; ``regex`` (Rust's syntax, without look-around), which the whole
    text matches; ``tools``, as OpenAI's clients give them, of which one is called (``tool``: that
    of this name) as the bundle's chat template writes calls, with arguments that are valid by its
    parameters. ``output``: the file to write them to, in one step.
    Raises ConstraintError where it cannot be compiled, naming the place; BundleError where the
    bundle has no tokenizer; UnsupportedTokenizerError for one whose texts cannot be followed.
    """
    given = [
        name
        for name, value in (
            ("json_schema", json_schema), ("choices", choices), ("regex", regex), ("tools", tools)
        )
        if value is not None
    ]  # fmt: skip
    if len(given) != 1:
        raise ConstraintError(
            "give one of json_schema, choices, regex and tools; given: "
            f"{', '.join(given) or 'none'}"
        )
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    model = opened.manifest.model
    if model.get("kind") == "encoder":
        raise ConstraintError("this model writes no text", where=str(opened.path))
    tokenizer = opened.tokenizer().read_bytes()
    if tools is not None:
        pattern, source, said = _calls(opened, tools, tool)
    else:
        pattern, source, said = _pattern(json_schema, choices, regex)
    compiled = compile_constraint(
        pattern,
        tokenizer,
        vocab_size=model["vocab_size"],
        ends=model.get("end") or _marked_ends(tokenizer),
        first_texts=model.get("kind") == "encoder-decoder",
        source=source,
        said=said,
    )
    if output is not None:
        _write(compiled.content, Path(output))
    return compiled


def _pattern(
    json_schema: Any, choices: Sequence[str] | None, regex: str | None
) -> tuple[str, bytes, str]:
    """What may be written as a regex; what its file is known by; what it is called in errors."""
    if json_schema is not None:
        return schema_regex(json_schema), _compact(json_schema), "the schema"
    if choices is not None:
        if not choices or not all(isinstance(c, str) and c for c in choices):
            raise ConstraintError(f"choices must be texts that are not empty, not {choices!r}")
        known = "choices\0" + "\0".join(choices)
        return "|".join(map(_escaped, choices)), known.encode(), "the list of choices"
    assert regex is not None
    return _without_anchors(regex), f"regex\0{regex}".encode(), f"the regex {regex!r}"


def _compact(value: Any) -> bytes:
    """Without the spaces that a file may have: slm-serve compares what a request brings so."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(
        errors="surrogatepass"
    )


def _calls(bundle: Bundle, tools: Sequence[Tool], tool: str | None) -> tuple[str, bytes, str]:
    """As ``_pattern``, of a call as the bundle's chat template writes it."""
    from slmtvm.runtime.chat import bundle_chat

    chat = bundle_chat(bundle)
    if chat.calls is None:
        why = chat.tools_reason or "what it writes of calls is not known"
        raise ConstraintError(f"the chat template has no calls of tools that can be read: {why}")
    syntax, options, names = chat.calls, [], []
    for number, offered in enumerate(tools):
        function = offered.get("function") if isinstance(offered, dict) else None
        function = function if isinstance(function, dict) else {}
        name = function.get("name")
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ConstraintError(
                f"tool {number} has no function with a name of 1 to 64 of a-z, A-Z, 0-9, _ and -"
            )
        names.append(name)
        if tool is None or tool == name:
            parameters = function.get("parameters") or _NOTHING
            options.append(f"{_escaped(name + syntax.middle)}(?:{schema_regex(parameters)})")
    if not options:
        raise ConstraintError(f"there is no tool {tool!r} among: {', '.join(names) or 'none'}")
    pattern = f"{_escaped(syntax.opening)}(?:{'|'.join(options)}){_escaped(syntax.closing)}"
    source = b"tools\0" + (tool or "").encode() + b"\0" + _compact(tools)
    return pattern, source, "the list of tools"


def _escaped(text: str) -> str:
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _without_anchors(regex: str) -> str:
    """The whole text is matched anyhow."""
    begin = regex[1:] if regex.startswith("^") else regex
    escapes = re.search(r"(\\*)\$$", begin)
    return begin[:-1] if escapes and len(escapes[1]) % 2 == 0 else begin


def _marked_ends(tokenizer: bytes) -> list[int]:
    from tokenizers import Tokenizer

    package = Tokenizer.from_buffer(tokenizer)
    ids = (package.token_to_id(mark) for mark in END_MARKS)
    return [id_ for id_ in ids if id_ is not None]


def _write(content: bytes, path: Path) -> None:
    made = path.with_name(f".{path.name}.new")
    try:
        made.write_bytes(content)
        made.replace(path)
    except OSError as error:
        made.unlink(missing_ok=True)
        raise SlmError(f"cannot be written: {error.strerror}", where=str(path)) from error
