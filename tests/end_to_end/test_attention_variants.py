"""Decoders whose layers attend in different ways, against the reference interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import slmtvm
from slmtvm.bundle.write import write_bundle
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.target import Target
from tests.passes import toy
from tests.passes.toy import CONTEXT, VOCAB, Layer

LAYERS = (
    Layer(norm="heads", q_base=500.0, k_base=500.0, window=21),  # Gemma 3, a local layer
    Layer(norm="heads", softcap=2.0),
    Layer(q_base=0, k_base=0, bias=True),  # BLOOM
    Layer(q_base=0, k_base=0, bias=True, bias_by="key", window=37),
    Layer(norm="rows", window=5),  # OLMo 2
    Layer(q_base=500.0, k_base=500.0, chunk=13),  # Llama 4
    Layer(norm="heads", norm_last=True),
    Layer(q_base=500.0),
)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, CONTEXT)


@dataclass(frozen=True)
class Compiled:
    model: CanonicalModel
    bundle: Path


# A single kv head is divided among threads.
@pytest.fixture(scope="module", params=[(toy.KV_HEADS, toy.HEAD_DIM), (1, 32)], ids=str)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "KV_HEADS", request.param[0])
        patch.setattr(toy, "HEAD_DIM", request.param[1])
        model = toy.decoder("f32", variants=LAYERS)
    target = Target.load("host")
    path = tmp_path_factory.mktemp("variants") / "b.slm"
    write_bundle(path, [(target, build_plan(lower(fuse(model), target, "float32"), {}))])
    return Compiled(model, path)


@pytest.mark.slow
def test_layers_of_every_kind_compute_the_reference(compiled: Compiled) -> None:
    wanted = evaluate(compiled.model, TOKENS)
    with slmtvm.load(compiled.bundle) as session:
        got = session.eval_all(TOKENS)
    np.testing.assert_allclose(got, wanted, atol=2e-5 * np.ptp(wanted))


@pytest.mark.slow
def test_their_chunks_and_threads_change_no_bit(compiled: Compiled) -> None:
    with slmtvm.load(compiled.bundle) as session:
        at_once = session.eval_all(TOKENS)
    for threads in (1, 3):
        with slmtvm.load(compiled.bundle, threads=threads, all_threads=True) as session:
            singly = np.stack([session.eval(TOKENS[i : i + 1]) for i in range(CONTEXT)])
        np.testing.assert_array_equal(at_once, singly)
