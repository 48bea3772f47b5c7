"""When outputs that stand side by side in rows count as the same: each by itself."""

from __future__ import annotations

import numpy as np
import pytest
from corpus.agreement import EXACT, ROUNDED, compare, largest_difference
from corpus.inputs import padded

from slmtvm.ir.model import Output

LENGTHS = (1, 3, 7)
EMBEDDING = (Output("token_embeddings", 4), Output("sentence_embedding", 4, pooled=True))
SPAN = (Output("start_logits", 1), Output("end_logits", 1))


def _rows(outputs: tuple[Output, ...], scale: float = 1.0) -> list[np.ndarray]:
    """Random rows; those of the first output are ``scale`` times as large as of the others."""
    random = np.random.default_rng(0)
    found = []
    for length in LENGTHS:
        parts = [random.normal(size=(1 if o.pooled else length, o.features)) for o in outputs]
        parts[0] *= scale
        found.append(np.concatenate([np.repeat(p, length // len(p), axis=0) for p in parts], 1))
    return found


def test_a_small_output_is_not_measured_by_the_range_of_a_large_one() -> None:
    theirs = _rows(EMBEDDING, scale=1e4)
    ours = [rows + np.array([0, 0, 0, 0, 0.1, 0, 0, 0]) for rows in theirs]
    assert compare(EXACT, ours, theirs).holds
    agreement = compare(EXACT, ours, theirs, EMBEDDING)
    assert not agreement.holds and agreement.difference > 0.01
    assert largest_difference(ours, theirs, EMBEDDING) == pytest.approx(agreement.difference)


def test_the_places_of_a_span_are_compared_with_each_other() -> None:
    theirs = _rows(SPAN)
    ours = [rows.copy() for rows in theirs]
    best = int(theirs[-1][:, 1].argmax())
    ours[-1][best, 1] = theirs[-1][:, 1].min()
    agreement = compare(ROUNDED, ours, theirs, SPAN)
    assert agreement.top1 < 1 and agreement.cosine < 0.999
    assert compare(ROUNDED, theirs, theirs, SPAN).holds


def test_one_number_for_each_text_is_compared_over_all_texts() -> None:
    outputs = (Output("score", 1, pooled=True),)
    theirs = [np.array([[score]]) for score in (0.5, -1.5, 2.0)]
    assert compare(ROUNDED, theirs, theirs, outputs).holds
    assert not compare(ROUNDED, [-rows for rows in theirs], theirs, outputs).holds


@pytest.mark.parametrize("outputs", [EMBEDDING, SPAN])
def test_what_is_no_number_agrees_with_nothing(outputs: tuple[Output, ...]) -> None:
    theirs = _rows(outputs)
    ours = [rows.copy() for rows in theirs]
    ours[1][0, -1] = np.nan
    assert not compare(EXACT, ours, theirs, outputs).holds


@pytest.mark.parametrize("padding", [None, 9])
def test_padding_stands_on_the_side_that_is_asked_for(padding: int | None) -> None:
    tokens = np.array([4, 5, 6], np.int32)
    for side, at in (("left", slice(-3, None)), ("right", slice(0, 3))):
        sentence = padded(tokens, side, padding)
        assert sentence.tokens[at].tolist() == tokens.tolist()
        assert sentence.visible[at].all() and sentence.visible.sum() == 3 < len(sentence.tokens)
        hidden = set(sentence.tokens[~sentence.visible].tolist())
        assert hidden == ({9} if padding else {3, 4, 5, 6, 7, 8})
