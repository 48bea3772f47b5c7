"""Random JSON schemas of what is compiled, and a tokenizer of single characters and a few words."""

from __future__ import annotations

import random
from typing import Any

from tokenizers import Tokenizer, decoders, models

_NAMES = ("speed", "x", "y", "left arm", 'quo"te', "größe", "a\\b", "🐍", "on", "mode")
_VALUES = ("stop", "go", 'say "hi"', "naïve", 1, -2.5, True, None, [1, "a"], {"k": 1, "l": []})
_PATTERNS = ("^[A-Z]{2}\\d{1,3}$", "a|b", "^(?:on|off)$", "^[^\"a]+\\.\\w*$", "x.y", "\\\\", "^$",
             "^\\S\\s?[\\d-]{2}$", "[^\\d]", "^[\\u0041-\\x5a]$")  # fmt: skip
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
WORDS = (
    '{"',
    '": ',
    '", "',
    '"}',
    "true",
    "false",
    "null",
    "10",
    "speed",
    "éa",
    '":',
    "[[",
    "\\\\",
)


def random_schema(rng: random.Random, depth: int = 3) -> Any:
    """A schema that some JSON is valid by."""
    kinds = ["integer", "number", "string", "enum", "const", "boolean", "null", "pattern", "format"]
    if depth:
        kinds += ["object", "array", "anyOf", "map", "tuple", "oneOf", "allOf", "types"] * 2
    return _MAKERS[rng.choice(kinds)](rng, depth)


def _object(rng: random.Random, depth: int) -> Any:
    names = rng.sample(_NAMES, rng.randint(1, 4))
    made = {"type": "object", "properties": {n: random_schema(rng, depth - 1) for n in names}}
    made["required"] = [n for n in names if rng.random() < 0.5]
    if rng.random() < 0.5:
        made["additionalProperties"] = False
    return made


def _bounds(rng: random.Random, whole: bool) -> dict[str, Any]:
    def number() -> float:
        value = rng.choice((rng.uniform(-3, 3), rng.uniform(-1000, 1000), rng.uniform(-1e9, 1e9)))
        return round(value) if whole or rng.random() < 0.3 else round(value, rng.randint(0, 4))

    low, high = sorted((number(), number()))
    made = {rng.choice(("minimum", "exclusiveMinimum")): low} if rng.random() < 0.7 else {}
    if rng.random() < 0.7:
        made[rng.choice(("maximum", "exclusiveMaximum"))] = high + 2
    return made


def _one_of(rng: random.Random, depth: int) -> Any:
    def option(kind: str) -> Any:
        return {"type": "object", "properties": {"kind": {"const": kind},
                                                 "value": random_schema(rng, depth - 1)},
                "required": ["kind"]}  # fmt: skip

    return {"oneOf": [option("a"), option("b"), {"type": "integer"}]}


_MAKERS: dict[str, Any] = {
    "integer": lambda rng, _: {"type": "integer", **_bounds(rng, whole=True)},
    "number": lambda rng, _: {"type": "number", **_bounds(rng, whole=False)},
    "string": lambda rng, _: {"type": "string", **rng.choice((
        {}, {"maxLength": rng.randint(0, 9)}, {"minLength": 2}, {"minLength": 2, "maxLength": 5}))},
    "pattern": lambda rng, _: {"type": "string", "pattern": rng.choice(_PATTERNS)},
    "format": lambda rng, _: {"type": "string", "format": rng.choice(_FORMATS)},
    "enum": lambda rng, _: {"enum": rng.sample(_VALUES, rng.randint(1, 4))},
    "const": lambda rng, _: {"const": rng.choice(_VALUES)},
    "boolean": lambda *_: {"type": "boolean", "title": "a switch"},
    "null": lambda *_: {"type": "null"},
    "object": _object,
    "map": lambda rng, depth: {
        "type": "object", "additionalProperties": random_schema(rng, depth - 1)},
    "array": lambda rng, depth: {
        "type": "array", "items": random_schema(rng, depth - 1),
        **rng.choice(({}, {"minItems": 1}, {"maxItems": 3}, {"minItems": 2, "maxItems": 4}))},
    "tuple": lambda rng, depth: {"type": "array", "prefixItems": [
        random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))], **rng.choice((
        {"items": False}, {"minItems": 1}, {"minItems": 4, "maxItems": 6}))},
    "anyOf": lambda rng, depth: {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]},
    "oneOf": _one_of,
    "allOf": lambda rng, depth: {"allOf": [
        {"type": "object", "properties": {"x": random_schema(rng, depth - 1)}, "required": ["x"]},
        {"properties": {"y": random_schema(rng, depth - 1)}}]},
    "types": lambda rng, _: {"type": rng.sample(("string", "null", "integer", "boolean"), 2)},
}  # fmt: skip


def character_tokenizer(size: int) -> Tokenizer:
    """``size`` tokens: an end, characters, words, and bytes of other characters if they fit."""
    tokens = ["<eos>", *(chr(c) for c in range(32, 127)), *WORDS]
    tokens += [f"<0x{byte:02X}>" for byte in range(128, 256)]
    vocabulary = {token: i for i, token in enumerate(tokens[:size])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer
