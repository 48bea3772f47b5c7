"""A session computes what the plan says, in chunks, with threads, after seeking, or says why."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmtvm.errors import BundleError, DeviceError
from slmtvm.runtime import Model, Session, load
from tests.runtime.toy import (
    BUCKETS,
    CONTEXT,
    HIDDEN,
    VOCAB,
    decoder_reference,
    encoder_reference,
    toy_weights,
)

WEIGHTS = toy_weights()
TOKENS = np.random.default_rng(0).integers(0, VOCAB, CONTEXT).tolist()
LOGITS = decoder_reference(TOKENS, WEIGHTS)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 15, 16, 17, 19, 20, 33, CONTEXT - 1, CONTEXT])
def test_a_prompt_of_any_length_gives_the_logits_of_its_last_token(
    decoder: Path, count: int
) -> None:
    with load(decoder) as session:
        logits = session.eval(TOKENS[:count])
        assert session.position == count
    assert logits.shape == (VOCAB,) and logits.dtype == np.float32
    np.testing.assert_array_equal(logits, LOGITS[count - 1])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_logits_of_all_tokens_are_the_same_for_every_number_of_threads(
    decoder: Path, threads: int
) -> None:
    with load(decoder, threads=threads, all_threads=True) as session:
        assert session.how["threads"] == threads
        np.testing.assert_array_equal(session.eval_all(TOKENS), LOGITS)


@pytest.mark.parametrize("cuts", [[1] * 5, [16, 1, 4], [3, 17, 2], [49, 1], [5, 45]])
def test_evaluating_in_pieces_equals_evaluating_at_once(decoder: Path, cuts: list[int]) -> None:
    with load(decoder) as session:
        at = 0
        for count in cuts:
            rows = session.eval_all(TOKENS[at : at + count])
            np.testing.assert_array_equal(rows, LOGITS[at : at + count])
            at += count


def test_seeking_back_keeps_the_prefix_and_forgets_the_rest(decoder: Path) -> None:
    with load(decoder) as session:
        session.eval(TOKENS[:30])
        session.seek(7)
        assert session.position == 7
        np.testing.assert_array_equal(session.eval_all(TOKENS[7:25]), LOGITS[7:25])
        session.reset()
        assert session.position == 0
        np.testing.assert_array_equal(session.eval(TOKENS[:3]), LOGITS[2])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 31, 32])
def test_an_encoder_ignores_its_padding(encoder: Path, count: int, threads: int) -> None:
    tokens = TOKENS[:count]
    with load(encoder, threads=threads) as session:
        rows = session.encode(TOKENS[: max(BUCKETS)])  # leaves other rows where padding will be
        rows = session.encode(tokens)
    assert rows.shape == (count, HIDDEN) and rows.dtype == np.float32
    np.testing.assert_array_equal(rows, encoder_reference(tokens, WEIGHTS))


def test_tokens_may_be_lists_or_arrays_of_any_integer_type(decoder: Path) -> None:
    with load(decoder) as session:
        strided = np.array([TOKENS[:5], TOKENS[5:10]]).T[:, 0]
        for tokens in (TOKENS[:5], tuple(TOKENS[:5]), np.array(TOKENS[:5], np.uint8), strided):
            session.reset()
            np.testing.assert_array_equal(session.eval(tokens), LOGITS[4])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no tokens"),
        ([VOCAB], f"token 0 is {VOCAB}"),
        ([0, -1], "token 1 is -1"),
        ([2**40], "out of range"),
        ([0.5], "whole numbers"),
        ([[1, 2]], "whole numbers"),
        ([0] * (CONTEXT + 1), "do not fit the context"),
    ],
)
def test_a_bad_prompt_is_refused_and_changes_nothing(
    decoder: Path, tokens: list[int], message: str
) -> None:
    with load(decoder) as session:
        session.eval(TOKENS[:3])
        for call in (session.eval, session.eval_all, session.generate):
            with pytest.raises(DeviceError, match=message):
                call(tokens)
        assert session.position == 3
        np.testing.assert_array_equal(session.eval(TOKENS[3:5]), LOGITS[4])


def test_a_full_context_takes_no_more_tokens(decoder: Path) -> None:
    with load(decoder) as session:
        session.eval(TOKENS)
        with pytest.raises(DeviceError, match=f"position {CONTEXT} do not fit"):
            session.eval([0])


def test_decoders_do_not_encode_and_encoders_do_not_generate(decoder: Path, encoder: Path) -> None:
    with load(decoder) as session, pytest.raises(DeviceError, match="is a decoder"):
        session.encode([1])
    with load(encoder) as session:
        for call in (session.eval, session.eval_all, session.generate):
            with pytest.raises(DeviceError, match="is an encoder"):
                call([1])
        with pytest.raises(DeviceError, match="is an encoder"):
            session.sample()
        with pytest.raises(DeviceError, match="do not fit the context of 32"):
            session.encode([1] * 33)


@pytest.mark.parametrize("position", [-1, 4, 2**31, -(2**40)])
def test_seeking_outside_the_context_is_refused(decoder: Path, position: int) -> None:
    with load(decoder) as session:
        session.eval(TOKENS[:3])
        with pytest.raises(DeviceError, match=r"seek|out of range"):
            session.seek(position)
        assert session.position == 3


def test_a_closed_session_answers_with_an_error(decoder: Path) -> None:
    session = load(decoder)
    session.close()
    session.close()
    with pytest.raises(DeviceError, match="closed"):
        session.eval([1])
    with pytest.raises(DeviceError, match="closed"):
        _ = session.position


@pytest.mark.parametrize("threads", [1, 2])
def test_sessions_of_one_model_are_independent_even_at_the_same_time(
    decoder: Path, threads: int
) -> None:
    model = Model(decoder, threads=threads)
    wrong: list[str] = []

    def converse(seed: int) -> None:
        tokens = np.random.default_rng(seed).integers(0, VOCAB, CONTEXT).tolist()
        wanted = decoder_reference(tokens, WEIGHTS)
        with Session(model) as session:
            for start in range(20):
                session.reset()
                count = 1 + (seed * 7 + start) % CONTEXT
                if not np.array_equal(session.eval_all(tokens[:count]), wanted[:count]):
                    wrong.append(f"seed {seed}, {count} tokens")

    workers = [threading.Thread(target=converse, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    model.close()


def test_a_session_that_another_thread_is_using_is_busy_and_stays_right(decoder: Path) -> None:
    """Both threads repeat one prompt; whatever order they come in, the context holds whole ones."""
    prompt, rounds = TOKENS[:2], 300
    done: list[int] = []
    unexpected: list[str] = []
    with load(decoder) as session:

        def hammer() -> None:
            count = 0
            for _ in range(rounds):
                try:
                    session.eval(prompt)
                    count += 1
                except DeviceError as error:
                    if "another thread" not in str(error) and "do not fit" not in str(error):
                        unexpected.append(str(error))
            done.append(count)

        workers = [threading.Thread(target=hammer) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not unexpected
        assert session.position == sum(done) * len(prompt) == CONTEXT
        session.seek(CONTEXT - 1)
        wanted = decoder_reference(prompt * (CONTEXT // 2), WEIGHTS)[-1]
        np.testing.assert_array_equal(session.eval(prompt[1:]), wanted)


def test_a_model_with_sessions_does_not_close(decoder: Path) -> None:
    model = Model(decoder)
    with Session(model), pytest.raises(DeviceError, match="1 sessions"):
        model.close()
    model.close()
    with pytest.raises(DeviceError, match="closed"):
        Session(model)


def test_no_more_threads_than_cores_are_used_and_how_says_why(decoder: Path) -> None:
    usable = len(os.sched_getaffinity(0))
    with load(decoder, threads=0) as session:
        np.testing.assert_array_equal(session.eval(TOKENS[:20]), LOGITS[19])
        assert session.how["asked"] == 0 and 1 <= session.how["threads"] <= usable
        assert session.how["why"]
    with load(decoder, threads=256) as session:
        np.testing.assert_array_equal(session.eval(TOKENS[:20]), LOGITS[19])
        assert session.how["asked"] == 256 and 1 <= session.how["threads"] <= usable


def _eval_on_one_core(decoder: Path, core: int, answers: multiprocessing.SimpleQueue[Any]) -> None:
    with load(decoder, threads=0, cores=str(core)) as session:
        session.eval([1])
        answers.put((session.how["threads"], session.how["cores"], os.sched_getaffinity(0)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_cores_that_are_named_are_computed_on(decoder: Path) -> None:
    core = max(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_eval_on_one_core, args=(decoder, core, answers))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    assert answers.get() == (1, str(core), {core})


@pytest.mark.parametrize("cores", ["", "one", "5-2", "900"])
def test_cores_that_are_none_are_refused(decoder: Path, cores: str) -> None:
    with pytest.raises(DeviceError, match="cores is"):
        load(decoder, cores=cores)


@pytest.mark.parametrize("threads", [-1, 257])
def test_an_impossible_number_of_threads_is_refused(decoder: Path, threads: int) -> None:
    with pytest.raises(DeviceError, match="threads"):
        load(decoder, threads=threads)


def _eval_in_child(session: Session, answers: multiprocessing.SimpleQueue[str]) -> None:
    try:
        session.eval([1])
        answers.put("no error")
    except DeviceError as error:
        answers.put(str(error))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_an_error_not_a_hang(decoder: Path) -> None:
    context = multiprocessing.get_context("fork")
    with load(decoder, threads=2) as session:
        answers = context.SimpleQueue()
        child = context.Process(target=_eval_in_child, args=(session, answers))
        child.start()
        child.join(timeout=30)
        assert child.exitcode == 0
        assert "after fork()" in answers.get()
        np.testing.assert_array_equal(session.eval(TOKENS[:2]), LOGITS[1])


def test_the_predicted_memory_is_what_a_session_takes(decoder: Path, encoder: Path) -> None:
    for path in (decoder, encoder):
        for threads in (1, 2, 5):
            with load(path, threads=threads, all_threads=True) as session:
                memory = session.info["memory"]
                scratch = memory["scratch_per_thread"] * threads
                wanted = memory["state"] + memory["arena"] + memory["io"] + scratch
                taken = session.model.library.call("slm_session_bytes", session.model.handle)
                assert taken == wanted
                entry = session.bundle.manifest.targets[session.model.target]
                assert entry.memory == memory
                assert memory["weights"] == (path / "weights.bin").stat().st_size


def test_info_tells_what_the_library_holds(decoder: Path) -> None:
    with load(decoder) as session:
        info = session.info
        assert info["kind"] == "decoder" and info["family"] == "toy"
        assert info["context"] == CONTEXT and info["vocab_size"] == VOCAB
        assert info["chunks"] == [1, 4, 16]
        assert info["quote"] == 'a "\\ trigraph ??/'
        assert info["target"] == session.model.target


def test_a_bundle_without_tokenizer_says_so(decoder: Path) -> None:
    with load(decoder) as session, pytest.raises(BundleError, match="no tokenizer"):
        _ = session.tokenizer
