"""The C runtime follows a constraint: what it chooses is the likeliest of what may follow."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from slmtvm.errors import BundleError, ConstraintError, DeviceError
from slmtvm.runtime import Session, load
from slmtvm.runtime.constraint import Constraint
from slmtvm.text.constraint import CompiledConstraint, compile_constraint, schema_regex
from tests.runtime.toy import CONTEXT, VOCAB, decoder_reference, toy_weights
from tests.text.constraint.schemas import character_tokenizer, random_schema
from tests.text.constraint.walk import read

TOKENIZER = character_tokenizer(VOCAB)  # an end and characters: toy texts are random ones
PROMPT = [5, 40, 7]
SCHEMA = {"type": "object", "properties": {"on": {"type": "boolean"}, "n": {"type": "integer"}},
          "required": ["on"]}  # fmt: skip


@pytest.fixture
def session(decoder: Path) -> Iterator[Session]:
    with load(decoder) as session:
        yield session


def compiled(regex: str, size: int = VOCAB, ends: tuple[int, ...] = (0,)) -> CompiledConstraint:
    return compile_constraint(
        regex, TOKENIZER.to_str().encode(), vocab_size=size, ends=ends, first_texts=False,
        source=b"", said="the regex",
    )  # fmt: skip


def write(session: Session, constraint: Constraint, most: int = 60, **more: Any) -> str:
    session.reset()
    return TOKENIZER.decode(list(session.generate(PROMPT, most, constraint=constraint, **more)))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 200.0])
def test_texts_are_valid_by_their_schemas(session: Session, temperature: float) -> None:
    written = 0
    for seed in range(60):
        schema = random_schema(random.Random(seed), 1)
        try:
            made = compiled(schema_regex(schema))
        except ConstraintError:  # the toy has no tokens for some characters
            continue
        if made.least_tokens > CONTEXT - len(PROMPT):
            continue
        constraint = session.constraint(made)
        text = write(session, constraint, temperature=temperature, seed=seed)
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        constraint.close()
        written += 1
    assert written > 25


def test_greedy_takes_the_likeliest_of_what_may_follow(session: Session) -> None:
    made = compiled(schema_regex(SCHEMA))
    walked, constraint = read(made.content), session.constraint(made)
    tokens, state = list(PROMPT), 0
    session.eval(PROMPT)
    for count in range(30):
        most = 30 - count
        logits = decoder_reference(tokens, toy_weights())[-1]
        allowed = [t for t, then in walked.rows[state].items() if walked.left[then] < most]
        allowed += walked.ends if walked.left[state] == 0 else []
        best = min(allowed, key=lambda t: (-logits[t], t))
        for choose in ({}, {"repetition_penalty": 1.0}, {"logit_bias": {3: 0.0}}):
            assert session.sample(constraint=constraint, state=state, most=most, **choose) == best
        if best in walked.ends:
            break
        assert constraint.next(state, best) == walked.rows[state][best]
        state = walked.rows[state][best]
        assert constraint.left(state) == walked.left[state]
        tokens.append(best)
        session.eval([best])
    else:
        pytest.fail("the text did not end")
    constraint.close()


def test_a_text_becomes_whole_within_its_tokens(session: Session) -> None:
    constraint = session.constraint(compiled('"[a-z]*"'))
    for most in (2, 3, 7):
        text = write(session, constraint, most, logit_bias={0: -1e6})
        assert len(text) <= most and text.endswith('"') and text.startswith('"')
    with pytest.raises(ConstraintError, match="asks for at least 2 tokens, and 1 may come"):
        write(session, constraint, 1)
    constraint.close()
    constraint = session.constraint(compiled("abc"))
    assert write(session, constraint) == "abc"
    assert constraint.is_over(3) and not constraint.is_over(2)
    constraint.close()


def test_of_what_may_follow_biases_and_penalties_choose(session: Session) -> None:
    constraint = session.constraint(compiled("[abc]{12}"))
    letters = {letter: TOKENIZER.token_to_id(letter) for letter in "abc"}
    assert write(session, constraint, logit_bias={letters["b"]: 1e6}) == "b" * 12
    even = write(session, constraint, frequency_penalty=1e5)
    assert sorted(even) == sorted("abc" * 4)
    constraint.close()


def test_what_does_not_fit_is_refused(session: Session, tmp_path: Path) -> None:
    constraint = session.constraint(compiled("[abc]{12}"))
    session.eval(PROMPT)
    with pytest.raises(DeviceError, match="state 99 of a constraint that has 13"):
        session.sample(constraint=constraint, state=99)
    with pytest.raises(ConstraintError, match="token 5 may not follow"):
        constraint.next(0, 5)
    with pytest.raises(DeviceError, match="token 200"):
        constraint.next(0, 200)
    constraint.close()
    other = session.constraint(compiled("[abc]", VOCAB + 1))
    with pytest.raises(ConstraintError, match="for a vocabulary of 102, this model has 101"):
        session.sample(constraint=other)
    other.close()
    with pytest.raises(BundleError, match="cannot open"):
        session.constraint(tmp_path / "missing")
    (tmp_path / "x").write_bytes(b"no constraint")
    with pytest.raises(ConstraintError, match="not a compiled constraint"):
        session.constraint(tmp_path / "x")


def test_a_damaged_constraint_is_refused_or_does_no_harm(session: Session, tmp_path: Path) -> None:
    content = compiled(schema_regex(SCHEMA)).content
    rng, refused = np.random.default_rng(0), 0
    path = tmp_path / "damaged"
    for _ in range(600):
        damaged = np.frombuffer(content, "<u4").copy()
        where = rng.integers(2, 26) if rng.random() < 0.3 else rng.integers(len(damaged))
        damaged[where] ^= np.uint32(1 << rng.integers(32)) if rng.random() < 0.7 else 0xFFFFFFFF
        cut = rng.integers(len(content)) if rng.random() < 0.1 else len(content)
        path.write_bytes(damaged.tobytes()[:cut])
        try:
            constraint = session.constraint(path)
        except (ConstraintError, BundleError):
            refused += 1
            continue
        try:
            write(session, constraint, 30, temperature=50.0)
        except (ConstraintError, DeviceError):
            refused += 1
        constraint.close()
    assert refused > 300


@pytest.mark.parametrize("presence", [0.0, 30.0])
@pytest.mark.parametrize("frequency", [0.0, -7.5, 12.25])
def test_presence_and_frequency_are_of_what_was_written(
    session: Session, presence: float, frequency: float
) -> None:
    text = [9, 40, 9, 9, 12, 77]
    logits = decoder_reference([*PROMPT, *text], toy_weights())[-1].astype(np.float64)
    for token in set(text):
        logits[token] -= presence + frequency * text.count(token)
    session.eval([*PROMPT, *text])
    assert session.sample(
        presence_penalty=presence, frequency_penalty=frequency, written=len(PROMPT)
    ) == int(np.argmax(logits))


@pytest.mark.parametrize(
    "parameters",
    [{"presence_penalty": float("nan")}, {"frequency_penalty": float("inf")}, {"written": -1},
     {"most": -1}, {"logit_bias": {VOCAB: 1.0}}, {"logit_bias": {3: float("nan")}}],
    ids=str,
)  # fmt: skip
def test_an_impossible_choice_is_refused_by_name(
    session: Session, parameters: dict[str, Any]
) -> None:
    session.eval(PROMPT)
    constraint = session.constraint(compiled("a"))
    with pytest.raises(DeviceError, match=next(iter(parameters)).replace("logit_", "")):
        session.sample(constraint=constraint, **parameters)
    constraint.close()
