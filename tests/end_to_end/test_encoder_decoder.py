"""A compiled encoder-decoder: the source is read once, and every step attends to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import slmtvm
from slmtvm.bundle.write import write_bundle
from slmtvm.errors import DeviceError
from slmtvm.ir.reference import encode_source, evaluate
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.target import host_target
from tests.passes.toy_encoder_decoder import CONTEXT, SOURCE_CONTEXT, VOCAB, encoder_decoder

RNG = np.random.default_rng(3)
TOKENS = RNG.integers(0, VOCAB, 23)


@pytest.fixture(scope="module")
def model():
    return encoder_decoder()


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    target = host_target()
    plan = build_plan(lower(fuse(model), target), {"hidden_size": model.hidden_size})
    path = tmp_path_factory.mktemp("seq2seq") / "toy.slm"
    write_bundle(path, [(target, plan)])
    return path


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("length", [1, 15, 16, 17, SOURCE_CONTEXT])
def test_hidden_states_and_logits_are_those_of_the_reference(model, bundle, length, threads):
    source = RNG.integers(0, VOCAB, length)
    with slmtvm.load(bundle, threads=threads, all_threads=True) as session:
        hidden = session.encode(source)
        logits = session.eval_all(TOKENS)
    want_hidden, want = encode_source(model, source), evaluate(model, TOKENS, source)
    assert np.abs(hidden - want_hidden).max() < 1e-4 * np.ptp(want_hidden)
    # The cache holds float16: the reference does not round.
    assert np.abs(logits - want).max() < 1e-3 * np.ptp(want)


def test_another_source_begins_another_context(model, bundle):
    first, second = (RNG.integers(0, VOCAB, n) for n in (30, 9))
    with slmtvm.load(bundle) as session:
        session.encode(second)
        fresh = session.eval_all(TOKENS)
        session.encode(first)
        other = session.eval_all(TOKENS)
        session.encode(second)
        assert session.position == 0
        again = session.eval_all(TOKENS)
    assert (again == fresh).all()
    assert np.abs(other - fresh).max() > 0.01 * np.ptp(fresh)


def test_tokens_one_by_one_give_the_bits_of_a_chunk(bundle):
    source = RNG.integers(0, VOCAB, 20)
    with slmtvm.load(bundle) as session:
        session.encode(source)
        whole = session.eval_all(TOKENS)
        session.reset()
        single = np.stack([session.eval([int(t)]) for t in TOKENS])
    assert (single == whole).all()


def test_a_decoder_without_its_source_is_refused(bundle):
    with slmtvm.load(bundle) as session:
        with pytest.raises(DeviceError, match="slm_encode its source first"):
            session.eval([1, 2])
        with pytest.raises(DeviceError, match=f"context of {SOURCE_CONTEXT}"):
            session.encode(np.zeros(SOURCE_CONTEXT + 1, np.int64))
        session.encode([5])
        with pytest.raises(DeviceError, match=f"context of {CONTEXT}"):
            session.eval_all(np.zeros(CONTEXT + 1, np.int64))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["keys", "skip"])
def test_hidden_tokens_of_a_source_are_those_of_the_reference(model, kind, tmp_path):
    target, masked = host_target(), replace(model, mask=kind)
    plan = build_plan(lower(fuse(masked), target, "float32"), {"hidden_size": model.hidden_size})
    write_bundle(tmp_path / "toy.slm", [(target, plan)])
    source = RNG.integers(0, VOCAB, 31)
    mask = RNG.random(31) < 0.5
    mask[0] = False
    with slmtvm.load(tmp_path / "toy.slm", threads=2, all_threads=True) as session:
        session.encode(source)
        hidden = session.encode(source, mask)
        logits = session.eval_all(TOKENS)
        session.reset()
        single = np.stack([session.eval([int(t)]) for t in TOKENS])
        with pytest.raises(DeviceError, match="only its source"):
            session.eval_all(TOKENS, np.arange(len(TOKENS)) > 0)
    want_hidden = encode_source(masked, source, mask=mask)
    want = evaluate(masked, TOKENS, source, mask=mask)
    assert np.abs(hidden - want_hidden).max() < 1e-4 * np.ptp(want_hidden)
    assert not hidden[~mask].any()
    assert np.abs(logits - want).max() < 1e-4 * np.ptp(want)
    assert (single == logits).all()
