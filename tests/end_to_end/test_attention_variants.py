"""Decoders whose layers attend in different ways, against the reference interpreter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import slmtvm
from slmtvm.bundle.write import write_bundle
from slmtvm.ir.reference import evaluate
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.target import Target
from tests.passes.toy import CONTEXT, VOCAB, Layer, decoder

LAYERS = (
    Layer(norm="heads", q_base=500.0, k_base=500.0, window=21),  # Gemma 3, a local layer
    Layer(norm="heads", softcap=2.0),
    Layer(q_base=0, k_base=0, bias=True),  # BLOOM
    Layer(norm="rows", window=5),  # OLMo 2
    Layer(norm="heads", norm_last=True),
    Layer(q_base=500.0),
)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, CONTEXT)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, target = decoder("f32", variants=LAYERS), Target.load("host")
    path = tmp_path_factory.mktemp("variants") / "b.slm"
    write_bundle(path, [(target, build_plan(lower(fuse(model), target, "float32"), {}))])
    return path


def test_layers_of_every_kind_compute_the_reference(bundle: Path) -> None:
    wanted = evaluate(decoder("f32", variants=LAYERS), TOKENS)
    with slmtvm.load(bundle) as session:
        got = session.eval_all(TOKENS)
    np.testing.assert_allclose(got, wanted, atol=2e-5 * np.ptp(wanted))


def test_their_chunks_and_threads_change_no_bit(bundle: Path) -> None:
    with slmtvm.load(bundle, threads=2) as session:
        at_once = session.eval_all(TOKENS)
    with slmtvm.load(bundle) as session:
        singly = np.stack([session.eval(TOKENS[i : i + 1]) for i in range(CONTEXT)])
    np.testing.assert_array_equal(at_once, singly)
