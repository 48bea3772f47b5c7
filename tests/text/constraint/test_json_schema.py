"""What a compiled schema lets be written is valid by jsonschema; what is beyond is refused."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from typing import Any

import jsonschema
import pytest

from slmtvm.errors import ConstraintError
from slmtvm.text.constraint import compile_constraint, schema_regex
from slmtvm.text.constraint.automaton import byte_automaton
from slmtvm.text.constraint.number_ranges import integer_regex, number_regex
from tests.text.constraint.schemas import character_tokenizer, random_schema
from tests.text.constraint.walk import read, write_text

TOKENIZER = character_tokenizer(400)
SPARE_TOKENS = 40


def texts_of(schema: Any, count: int, seed: int) -> list[str]:
    size = TOKENIZER.get_vocab_size()
    compiled = compile_constraint(
        schema_regex(schema), TOKENIZER.to_str().encode(), vocab_size=size, ends=[0],
        first_texts=False, source=b"", said="the schema",
    )  # fmt: skip
    walked, rng = read(compiled.content), random.Random(seed)
    most = compiled.least_tokens + SPARE_TOKENS
    assert walked.left[0] == compiled.least_tokens and walked.ends == {0}
    written = [write_text(walked, rng, most) for _ in range(count)]
    assert all(compiled.least_tokens <= len(tokens) <= most for tokens in written)
    return [TOKENIZER.decode(tokens) for tokens in written]


def check(seed: int, texts: int) -> None:
    schema = random_schema(random.Random(seed))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    for text in texts_of(schema, texts, seed):
        validator.validate(json.loads(text))


@pytest.mark.parametrize("seed", range(20))
def test_what_is_written_is_valid(seed: int) -> None:
    check(seed, 10)


@pytest.mark.exhaustive
@pytest.mark.parametrize("block", range(20))
def test_what_is_written_is_valid_by_a_thousand_schemas(block: int) -> None:
    for seed in range(1000 + 50 * block, 1050 + 50 * block):
        check(seed, 20)


def accepts(regex: str, text: str) -> bool:
    automaton = byte_automaton(regex, "it")
    state = automaton.start
    for byte in text.encode():
        state = int(automaton.next[state, byte])
    return bool(automaton.accepts[state])


@pytest.mark.parametrize(
    ("least", "most"), [(0, 0), (-7, 12), (95, 1203), (-1000, -1), (None, 30), (-30, None), (7, 7)]
)
def test_whole_numbers_between_bounds_are_all_that_is_written(
    least: int | None, most: int | None
) -> None:
    low, high = (None if b is None else Decimal(b) for b in (least, most))
    automaton = byte_automaton(integer_regex(low, high, "it"), "it")
    for number in range(-1300, 1300):
        state = automaton.start
        for byte in str(number).encode():
            state = int(automaton.next[state, byte])
        inside = (least is None or number >= least) and (most is None or number <= most)
        assert bool(automaton.accepts[state]) == inside, number


def test_numbers_keep_to_their_bounds_to_the_last_decimal() -> None:
    regex = number_regex(Decimal("-1.25"), Decimal("0.5"), False, True, "it")
    yes = ("-1.25", "-1", "0", "0.49", "-0.01", "0.00", "-1.00")
    no = ("-1.26", "0.50", "1", "0.5", "-2", "00.1", "-0", ".1")
    assert [t for t in yes + no if accepts(regex, t)] == list(yes)


def test_a_recursive_schema_is_refused_and_one_that_refers_is_not() -> None:
    definitions = {"point": {"type": "object", "properties": {"x": {"type": "integer"}}}}
    schema = {"$ref": "#/$defs/point", "$defs": definitions}
    assert accepts(schema_regex(schema), '{"x": 12}')
    definitions["point"]["properties"]["x"] = {"$ref": "#/$defs/point"}
    with pytest.raises(ConstraintError, match="refers to itself"):
        schema_regex(schema)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True}, "at /: uniqueItems is not compiled"),
        ({"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 3}}},
         "at /properties/a: multipleOf is not compiled"),
        ({"type": "integer", "minLength": 3}, "minLength is not compiled beside the type integer"),
        ({"not": {"type": "string"}}, "not without a type"),
        ({"type": "strin"}, "type is 'strin'; known are object"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "may both hold"),
        ({"type": "string", "format": "iri"}, "format is 'iri'; known are date"),
        ({"type": "string", "pattern": "(?=a)b"}, r"has \(\?="),
        ({"type": "string", "pattern": "a("}, "is no regex"),
        ({"type": "string", "pattern": "a^b"}, "has \\^ inside"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "allows no number"),
        ({"type": "integer", "minimum": "3"}, "minimum is '3', must be a number"),
        ({"$ref": "other.json"}, "those inside of the schema"),
        ({"$ref": "#/$defs/no"}, "which is not there"),
        ({"type": "object", "required": ["a"], "additionalProperties": False},
         "'a' is required and not allowed"),
        (False, "false allows nothing"),
        ([], "is no schema"),
    ],
)  # fmt: skip
def test_what_is_not_compiled_is_refused_by_name(schema: Any, message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        schema_regex(schema)
