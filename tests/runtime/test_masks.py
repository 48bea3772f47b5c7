"""Sessions with hidden tokens: what is computed, what is refused, what a context then holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slmtvm.errors import DeviceError
from slmtvm.runtime import load
from tests.runtime.conftest import ToyBundle
from tests.runtime.toy import (
    CONTEXT,
    HIDDEN,
    VOCAB,
    decoder_reference,
    encoder_reference,
    toy_weights,
)

WEIGHTS = toy_weights()
RNG = np.random.default_rng(5)
TOKENS = RNG.integers(0, VOCAB, CONTEXT).tolist()
ENCODED = 29
LEFT = np.arange(CONTEXT) >= 19  # more than a chunk of 16
HOLES = np.where(np.arange(CONTEXT) % 50 == 49, True, RNG.random(CONTEXT) < 0.5)
ALL = np.ones(CONTEXT, bool)


@pytest.fixture(params=["keys", "skip"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def masked_decoder(kind: str, toy_bundle: ToyBundle) -> Path:
    return toy_bundle("decoder", kind)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mask", [LEFT, HOLES, ALL, ~LEFT], ids=["left", "holes", "all", "right"])
def test_hidden_tokens_are_not_seen_and_have_rows_of_zeros(
    masked_decoder: Path, kind: str, mask: np.ndarray, threads: int
) -> None:
    with load(masked_decoder, threads=threads, all_threads=True) as session:
        assert session.info["mask"] == kind
        rows = session.eval_all(TOKENS, mask)
        assert session.position == (CONTEXT if kind == "keys" else mask.sum())
    np.testing.assert_array_equal(rows, decoder_reference(TOKENS, WEIGHTS, mask))
    assert not rows[~mask].any()


@pytest.mark.parametrize("cuts", [[1] * 9, [16, 1, 4], [3, 17, 2], [49, 1]])
def test_a_masked_prompt_in_pieces_equals_one_at_once(
    masked_decoder: Path, cuts: list[int]
) -> None:
    want, at = decoder_reference(TOKENS, WEIGHTS, HOLES), 0
    with load(masked_decoder) as session:
        for count in cuts:
            piece = slice(at, at + count)
            np.testing.assert_array_equal(
                session.eval_all(TOKENS[piece], HOLES[piece]), want[piece]
            )
            at += count


def test_decoding_goes_on_after_a_left_padded_prompt(masked_decoder: Path) -> None:
    prompt, mask = TOKENS[:30], LEFT[:30]
    with load(masked_decoder) as session:
        tokens = list(session.generate(prompt, 5, mask=mask))
        session.reset()
        logits = session.eval(prompt, mask.tolist())
        for count, token in enumerate(tokens):
            shown = np.append(mask, [True] * count)
            want = decoder_reference([*prompt, *tokens[:count]], WEIGHTS, shown)[-1]
            np.testing.assert_array_equal(logits, want)
            assert session.sample() == token == int(want.argmax())
            logits = session.eval([token])


def test_seeking_back_forgets_what_was_hidden(masked_decoder: Path, kind: str) -> None:
    with load(masked_decoder) as session:
        session.eval_all(TOKENS[:40], HOLES[:40])
        before = 10 if kind == "keys" else int(HOLES[:10].sum())
        session.seek(before)
        rows = session.eval_all(TOKENS[10:20])
        mask = np.append(HOLES[:10], [True] * 10)
        np.testing.assert_array_equal(rows, decoder_reference(TOKENS[:20], WEIGHTS, mask)[10:])
        session.reset()
        np.testing.assert_array_equal(
            session.eval_all(TOKENS[:20]), decoder_reference(TOKENS[:20], WEIGHTS)
        )


def test_hidden_tokens_do_not_count_as_repetitions(masked_decoder: Path) -> None:
    mask = [1] * 9 + [0] * 20 + [1]
    prompt = TOKENS[:9] + list(range(20)) + TOKENS[9:10]
    with load(masked_decoder) as session:
        session.eval(prompt, mask)
        masked = session.sample(repetition_penalty=1e6)
        session.reset()
        session.eval(TOKENS[:10])
        assert session.sample(repetition_penalty=1e6) == masked


def test_a_value_other_than_zero_is_visible(masked_decoder: Path) -> None:
    with load(masked_decoder) as session:
        for mask in (HOLES * 255, HOLES * -3, HOLES * 0.5, HOLES.tolist()):
            session.reset()
            rows = session.eval_all(TOKENS, mask)
            np.testing.assert_array_equal(rows, decoder_reference(TOKENS, WEIGHTS, HOLES))


def test_logits_are_those_of_a_visible_last_token(masked_decoder: Path) -> None:
    with load(masked_decoder) as session:
        session.eval(TOKENS[:3])
        with pytest.raises(DeviceError, match="hides the last token"):
            session.eval(TOKENS[3:6], [1, 1, 0])
        with pytest.raises(DeviceError, match="hides the last token"):
            session.generate(TOKENS[3:6], mask=[0, 0, 0])
        assert session.position == 3
        session.eval_all(TOKENS[3:6], [1, 1, 0])
        with pytest.raises(DeviceError, match="no logits"):
            session.sample()


@pytest.mark.parametrize("mask", [[1, 1], [[1, 1, 1]], ["a", "b", "c"], 1])
def test_a_mask_of_another_form_is_refused(masked_decoder: Path, mask: object) -> None:
    with load(masked_decoder) as session:
        for call in (session.eval, session.eval_all):
            with pytest.raises(DeviceError, match=r"mask must be a list or \(3,\) array"):
                call([1, 2, 3], mask)  # type: ignore[arg-type]


def test_only_what_is_kept_must_fit_the_context(masked_decoder: Path, kind: str) -> None:
    with load(masked_decoder) as session:
        session.eval(TOKENS[:40])
        mask = [0] * 20 + [1] * 5
        if kind == "keys":
            with pytest.raises(DeviceError, match="25 tokens at position 40 do not fit"):
                session.eval(TOKENS[:25], mask)
        else:
            session.eval(TOKENS[:25], mask)
            assert session.position == 45
        with pytest.raises(DeviceError, match="do not fit"):
            session.eval([0] * (CONTEXT + 1), [0] * CONTEXT + [1])


@pytest.mark.parametrize("kind", ["keys", "skip"])
@pytest.mark.parametrize("mask", [LEFT[-ENCODED:], HOLES[-ENCODED:], ~LEFT[:ENCODED]])
def test_an_encoder_does_not_see_hidden_tokens(
    kind: str, mask: np.ndarray, toy_bundle: ToyBundle
) -> None:
    tokens = TOKENS[:ENCODED]
    with load(toy_bundle("encoder", kind), threads=2, all_threads=True) as session:
        session.encode(tokens)
        rows = session.encode(tokens, mask)
        with pytest.raises(DeviceError, match="hides every token"):
            session.encode(tokens, [0] * ENCODED)
    want = encoder_reference(tokens, WEIGHTS, mask)
    if kind == "skip":
        want[mask] = encoder_reference(np.array(tokens)[mask].tolist(), WEIGHTS)
    np.testing.assert_array_equal(rows, want)


@pytest.mark.parametrize("length", [1, 7, 8, 9, ENCODED])
def test_without_the_option_an_encoders_mask_gives_its_length(encoder: Path, length: int) -> None:
    with load(encoder) as session:
        rows = session.encode(TOKENS[:ENCODED], np.arange(ENCODED) < length)
    np.testing.assert_array_equal(rows[:length], encoder_reference(TOKENS[:length], WEIGHTS))
    assert rows.shape == (ENCODED, HIDDEN) and not rows[length:].any()


@pytest.mark.parametrize("mask", [[0, 1, 1], [1, 0, 1]])
def test_without_the_option_other_masks_are_refused(
    decoder: Path, encoder: Path, mask: list[int]
) -> None:
    with load(encoder) as session, pytest.raises(DeviceError, match="--mask arbitrary"):
        session.encode(TOKENS[:3], mask)
    with load(decoder) as session:
        for call in (session.eval, session.eval_all):
            with pytest.raises(DeviceError, match="--mask arbitrary"):
                call(TOKENS[:3], mask)
        assert session.position == 0
        ones = session.eval_all(TOKENS[:3], [1, 2, 1])
    np.testing.assert_array_equal(ones, decoder_reference(TOKENS[:3], WEIGHTS))
