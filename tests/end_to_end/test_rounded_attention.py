"""Decoders whose scores are rounded with their bias, as statically quantized BLOOM has them."""

from __future__ import annotations

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
from tests.emulation.session import open_sessions
from tests.end_to_end.bundles import RUNNABLE
from tests.passes import toy
from tests.passes.toy import CONTEXT, VOCAB, Layer

ROUNDINGS = {
    "roundings": "1.0:0.125:-130:125", "sum_roundings": "1.0:0.034:-72:183",
    "weight_roundings": f"1.0:{1 / 255!r}:0:255",
}  # fmt: skip
LAYERS = (
    Layer(q_base=0, k_base=0, bias=True, bias_by="key", **ROUNDINGS),
    Layer(q_base=0, k_base=0, bias=True, bias_by="key", window=21, **ROUNDINGS),
    Layer(q_base=0, k_base=0, bias=True, **ROUNDINGS),
)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, CONTEXT)
EXACT, FLIP = 2e-5, 2e-2  # of the logits' range; a last bit can turn a rounding elsewhere


def _write(model: CanonicalModel, path: Path, targets: tuple[str, ...]) -> None:
    fused, loaded = fuse(model), [Target.load(name) for name in targets]
    write_bundle(path, [(t, build_plan(lower(fused, t, "float32"), {})) for t in loaded])


@pytest.fixture(scope="module")
def model() -> CanonicalModel:
    return toy.decoder("f32", variants=LAYERS)


@pytest.fixture(scope="module")
def bundle(model: CanonicalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rounded") / "b.slm"
    _write(model, path, ("host",))
    return path


@pytest.mark.slow
def test_a_bundle_computes_the_reference(model: CanonicalModel, bundle: Path) -> None:
    want = evaluate(model, TOKENS)
    with slmtvm.load(bundle) as session:
        got = session.eval_all(TOKENS)
    errors = np.abs(got - want).max(axis=1) / np.ptp(want)
    assert np.median(errors) <= EXACT
    assert errors.max() <= FLIP


@pytest.mark.slow
def test_no_chunk_or_thread_or_step_back_changes_a_bit(bundle: Path) -> None:
    with slmtvm.load(bundle) as session:
        at_once = session.eval_all(TOKENS)
        session.seek(60)  # within what the window keeps
        np.testing.assert_array_equal(session.eval_all(TOKENS[60:]), at_once[60:])
    for threads in (1, 2, 3):
        with slmtvm.load(bundle, threads=threads, all_threads=True) as session:
            singly = np.stack([session.eval(TOKENS[i : i + 1]) for i in range(CONTEXT)])
            session.reset()
            chunks = [session.eval_all(part) for part in np.split(TOKENS, [5, 37, 70])]
        np.testing.assert_array_equal(singly, at_once)
        np.testing.assert_array_equal(np.concatenate(chunks), at_once)


@pytest.mark.slow
def test_no_target_changes_a_bit(model: CanonicalModel, tmp_path: Path) -> None:
    path = tmp_path / "b.slm"
    _write(model, path, RUNNABLE)
    computed = {
        f"{target.name} {session.cpu}": session.eval_all(TOKENS, CONTEXT)
        for target in map(Target.load, RUNNABLE)
        for session in open_sessions(path, target, tmp_path)
    }
    first = next(iter(computed.values()))
    for where, logits in computed.items():
        np.testing.assert_array_equal(logits, first, err_msg=where)
