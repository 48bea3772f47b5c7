"""Sampling keeps the tokens that a plain numpy version keeps, as often as they are likely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmtvm.errors import DeviceError
from slmtvm.runtime import Session, load
from tests.runtime.toy import CONTEXT, VOCAB, decoder_reference, toy_weights

PROMPT = [5, 40, 7, 7, 99]
DRAWS = 3000
# Standard deviations; with some 100 probabilities and fixed seeds nothing comes near by chance.
MAX_DEVIATION = 5.0


@pytest.fixture(scope="module")
def session(decoder: Path) -> Iterator[Session]:
    with load(decoder) as session:
        session.eval(PROMPT)
        yield session


def probabilities(
    logits: np.ndarray,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    repetition_penalty: float = 0.0,
) -> np.ndarray:
    """(vocab,) float64: what each token's chance should be, step by step, all sorted."""
    logits = logits.astype(np.float64)
    if repetition_penalty:
        for token in set(PROMPT):
            positive = logits[token] > 0
            logits[token] *= 1 / repetition_penalty if positive else repetition_penalty
    order = np.lexsort((np.arange(len(logits)), -logits))
    if top_k:
        order = order[:top_k]
    weights = np.exp((logits[order] - logits[order[0]]) / temperature)
    if 0 < top_p < 1:
        before = np.cumsum(weights) - weights
        keep = before < np.float32(top_p) * weights.sum()
        order, weights = order[keep], weights[keep]
    keep = weights >= np.float32(min_p)
    order, weights = order[keep], weights[keep]
    result = np.zeros(len(logits))
    result[order] = weights / weights.sum()
    return result


PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 150.0},
    {"temperature": 150.0, "top_k": 1},
    {"temperature": 150.0, "top_k": 7},
    {"temperature": 150.0, "top_k": 29},  # the 29th and the 30th are equally likely
    {"temperature": 150.0, "top_k": VOCAB},
    {"temperature": 150.0, "top_k": 10**6},
    {"temperature": 150.0, "top_p": 0.5},
    {"temperature": 150.0, "top_p": 0.9},
    {"temperature": 150.0, "top_p": 1.0},
    {"temperature": 150.0, "top_p": 1e-6},
    {"temperature": 150.0, "min_p": 0.2},
    {"temperature": 150.0, "min_p": 1.0},
    {"temperature": 150.0, "top_k": 12, "top_p": 0.7},
    {"temperature": 150.0, "top_k": 30, "top_p": 0.8, "min_p": 0.3},
    {"temperature": 150.0, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 100.0, "repetition_penalty": 3.0},
    {"temperature": 100.0, "repetition_penalty": 0.5, "top_k": 20},
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_tokens_are_drawn_as_often_as_they_are_likely(
    session: Session, parameters: dict[str, Any]
) -> None:
    logits = decoder_reference(PROMPT, toy_weights())[-1]
    wanted = probabilities(logits, **parameters)
    counts = Counter(session.sample(seed=seed, **parameters) for seed in range(DRAWS))
    drawn = np.array([counts[token] for token in range(VOCAB)])
    assert not drawn[wanted == 0].any()
    deviation = np.abs(drawn - DRAWS * wanted) / np.sqrt(DRAWS * wanted * (1 - wanted) + 1)
    assert deviation.max() < MAX_DEVIATION


def test_greedy_takes_the_likeliest(session: Session) -> None:
    logits = decoder_reference(PROMPT, toy_weights())[-1]
    assert session.sample() == int(np.argmax(logits))
    assert session.sample(seed=123, top_k=5, top_p=0.3) == int(np.argmax(logits))


@pytest.mark.parametrize("penalty", [0.25, 2.0, 8.0])
def test_greedy_heeds_the_repetition_penalty(decoder: Path, penalty: float) -> None:
    likeliest = int(np.argmax(decoder_reference(PROMPT, toy_weights())[-1]))
    prompt = [likeliest, *PROMPT, likeliest]
    logits = decoder_reference(prompt, toy_weights())[-1]
    seen = list(set(prompt))
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    with load(decoder) as session:
        session.eval([0, 1, 2])
        session.reset()
        session.eval(prompt)
        assert session.sample(repetition_penalty=penalty) == int(np.argmax(logits))


def test_the_same_seed_gives_the_same_tokens_and_another_one_others(decoder: Path) -> None:
    def generate(seed: int | None) -> list[int]:
        with load(decoder) as session:
            return list(session.generate(PROMPT, 30, temperature=1000.0, seed=seed))

    assert generate(1) == generate(1)
    assert generate(1) != generate(2)
    assert generate(None) != generate(None)
    assert generate(-1) == generate(2**64 - 1)


def test_generation_ends_at_the_limit_a_stop_token_or_the_end_of_the_context(
    decoder: Path,
) -> None:
    with load(decoder) as session:
        tokens = list(session.generate(PROMPT, 20))
        assert len(tokens) == 20
        session.reset()
        stop = tokens[9]
        assert list(session.generate(PROMPT, 20, stop={stop})) == tokens[: tokens.index(stop)]
        session.reset()
        everything = list(session.generate(PROMPT, 10**6))
        # The last token needs no place in the context.
        assert len(everything) == CONTEXT - len(PROMPT) + 1
        session.reset()
        assert list(session.generate(PROMPT, 0)) == []
        assert session.position == len(PROMPT)


def test_greedy_generation_follows_the_reference(decoder: Path) -> None:
    tokens = list(PROMPT)
    for _ in range(12):
        tokens.append(int(np.argmax(decoder_reference(tokens, toy_weights())[-1])))
    with load(decoder) as session:
        assert list(session.generate(PROMPT, 12)) == tokens[len(PROMPT) :]


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"top_k": -1}, {"top_k": 2**31}, {"top_p": -0.1}, {"top_p": 1.5}, {"top_p": float("nan")},
        {"min_p": 2.0}, {"repetition_penalty": -1.0}, {"repetition_penalty": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_an_impossible_parameter_is_refused_by_name(
    session: Session, parameters: dict[str, Any]
) -> None:
    with pytest.raises(DeviceError, match=next(iter(parameters))):
        session.sample(**parameters)


def test_there_is_nothing_to_sample_before_the_first_token_and_after_a_seek(decoder: Path) -> None:
    with load(decoder) as session:
        with pytest.raises(DeviceError, match="no logits"):
            session.sample()
        session.eval(PROMPT)
        session.seek(len(PROMPT))
        session.sample()
        session.seek(2)
        with pytest.raises(DeviceError, match="no logits"):
            session.sample()
