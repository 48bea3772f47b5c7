"""Tokens of several sessions evaluated together are those of each alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from slmtvm.bundle.write import write_bundle
from slmtvm.errors import DeviceError
from slmtvm.runtime import Model, Session, generate_batch, load
from slmtvm.target import Target
from tests.runtime.conftest import ToyBundle
from tests.runtime.toy import (
    BATCH_ROWS,
    CONTEXT,
    VOCAB,
    decoder_reference,
    toy_decoder,
    toy_weights,
)

WEIGHTS = toy_weights()


@pytest.fixture
def sessions(decoder: Path) -> Iterator[list[Session]]:
    """Seven sessions of one model that hold texts of different lengths."""
    with ExitStack() as stack:
        model = Model(decoder, threads=2, all_threads=True)
        stack.callback(model.close)
        made = [stack.enter_context(Session(model)) for _ in range(7)]
        for index, session in enumerate(made):
            session.eval(text_of(index))
        yield made


def text_of(index: int) -> list[int]:
    return [(3 * index + i) % VOCAB for i in range(1 + 2 * index)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_each_session_has_the_logits_of_its_own_text(sessions: list[Session], count: int) -> None:
    chosen = sessions[::-1][:count]
    texts = [text_of(index) for index in range(7)][::-1][:count]
    for step in range(3):
        tokens = [(11 * step + i) % VOCAB for i in range(count)]
        got = Session.eval_batch(chosen, tokens)
        texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
        wanted = [decoder_reference(text, WEIGHTS)[-1] for text in texts]
        np.testing.assert_array_equal(got, wanted)
        assert [s.position for s in chosen] == [len(text) for text in texts]
        assert [s.sample() for s in chosen] == [int(np.argmax(row)) for row in wanted]


@pytest.mark.parametrize("mask", ["keys", "skip"])
def test_keys_that_one_session_hides_are_hidden_there_alone(
    toy_bundle: ToyBundle, mask: str
) -> None:
    with ExitStack() as stack:
        model = Model(toy_bundle("decoder", mask))
        stack.callback(model.close)
        first, second = (stack.enter_context(Session(model)) for _ in range(2))
        hides = [1, 0, 0, 1]
        first.eval([1, 2, 3, 4], mask=hides)
        second.eval([1, 2, 3, 4])
        got = Session.eval_batch([first, second], [5, 5])
        for row, visible in zip(got, ([*hides, 1], [1] * 5), strict=True):
            wanted = decoder_reference([1, 2, 3, 4, 5], WEIGHTS, np.array(visible))
            np.testing.assert_array_equal(row, wanted[-1])


def test_a_model_without_batches_takes_turns(tmp_path: Path) -> None:
    write_bundle(tmp_path / "x.slm", [(Target.load("host"), toy_decoder(batches=False))])
    with ExitStack() as stack:
        model = Model(tmp_path / "x.slm")
        stack.callback(model.close)
        assert model.info["batches"] == []
        made = [stack.enter_context(Session(model)) for _ in range(3)]
        got = Session.eval_batch(made, [1, 2, 3])
    np.testing.assert_array_equal(got, [decoder_reference([t], WEIGHTS)[-1] for t in (1, 2, 3)])


def test_a_batch_that_is_refused_changes_no_session(
    sessions: list[Session], encoder: Path, decoder: Path
) -> None:
    first, second, *_ = sessions
    before = [s.position for s in sessions]
    with load(decoder) as other, pytest.raises(DeviceError, match="session 1 is of another model"):
        Session.eval_batch([first, other], [1, 2])
    with pytest.raises(DeviceError, match="session 2 is session 0 again"):
        Session.eval_batch([first, second, first], [1, 2, 3])
    with pytest.raises(DeviceError, match=f"session 1: token 0 is {VOCAB}"):
        Session.eval_batch([first, second], [1, VOCAB])
    with pytest.raises(DeviceError, match="1 tokens for 2 sessions"):
        Session.eval_batch([first, second], [1])
    with pytest.raises(DeviceError, match="no sessions"):
        Session.eval_batch([], [])
    second.eval([1] * (CONTEXT - second.position))
    with pytest.raises(DeviceError, match=r"session 1: .*do not fit the context"):
        Session.eval_batch([first, second], [1, 1])
    second.seek(before[1])
    assert [s.position for s in sessions] == before
    with load(encoder) as session, pytest.raises(DeviceError, match="this model is an encoder"):
        Session.eval_batch([session], [1])


def test_several_prompts_are_continued_as_each_alone(decoder: Path) -> None:
    prompts = [text_of(index) for index in (3, 0, 5)]
    given = {"temperature": 1.0, "seed": 3, "stop": (7,)}
    with load(decoder) as session:
        wanted = []
        for prompt in prompts:
            session.reset()
            wanted.append([*session.generate(prompt, CONTEXT, **given)])
        assert generate_batch(session.model, prompts, CONTEXT, **given) == wanted
        assert generate_batch(session.model, prompts, 0) == [[], [], []]
        assert sorted(session.info["batches"]) == sorted(BATCH_ROWS)
