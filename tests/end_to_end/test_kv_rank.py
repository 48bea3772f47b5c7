"""Caches of fewer features than heads have: the same bits everywhere, near the reference."""

from __future__ import annotations

import itertools
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

import slmtvm
from slmtvm.bundle.write import write_bundle
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from slmtvm.low_rank import low_rank
from slmtvm.plan.build import build_plan
from slmtvm.planner import Planner
from slmtvm.runtime.model import Model
from slmtvm.runtime.session import Session
from slmtvm.target import Target
from tests.emulation.session import open_sessions
from tests.end_to_end.bundles import TARGETS_OF_THREE
from tests.passes.toy import CONTEXT, KV_HEADS, VOCAB, Layer, decoder

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(8)
WINDOWS = [RNG.integers(0, VOCAB, 32) for _ in range(8)]
TOKENS = RNG.integers(0, VOCAB, CONTEXT)
RANK = 8  # of 16
# A rotation and one that attention leaves to others, norms of heads, a window, none of them.
LAYERS = (Layer(norm="heads"), Layer(k_base=5000.0), Layer(window=20), Layer(q_base=0, k_base=0))
FORMS = {"int4": "f32", "int8": "int8", "f32": "int4"}


@pytest.fixture(scope="module")
def models() -> dict[str, CanonicalModel]:
    layers = {form: LAYERS if form == "int4" else LAYERS[2:] for form in FORMS}
    return {f: low_rank(decoder(f, variants=layers[f]), RANK, WINDOWS)[0] for f in FORMS}


@pytest.fixture(scope="module")
def folder(models: dict[str, CanonicalModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rank")
    for form, kv in FORMS.items():
        targets = TARGETS_OF_THREE if form == "int4" else ("host",)
        planner = Planner(models[form], kv=kv)
        loaded = [Target.load(name) for name in targets]
        plans = [(t, build_plan(planner.lower(t), planner.info)) for t in loaded]
        write_bundle(made / f"{form}.slm", plans)
    return made


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_its_reference_and_keeps_so_many_features(
    form: str, folder: Path, models: dict[str, CanonicalModel]
) -> None:
    want = evaluate(models[form], TOKENS)
    with slmtvm.load(folder / f"{form}.slm") as session:
        got = session.eval_all(TOKENS)
        info = session.info
    # Float activations of the integer forms are rounded, and so are keys and values.
    wrong = np.abs(got - want).mean() / np.abs(want).mean()
    assert wrong < {"int4": 0.02, "int8": 0.03, "f32": 0.12}[form]
    heads = 2 * len(models[form].kv) * KV_HEADS
    assert sum(info["kv_ranks"]) == RANK * len(models[form].kv)
    numbers = heads * RANK
    scales = {"f32": 0, "int8": 4 * heads, "int4": 4 * heads}
    size = {"f32": 4.0, "int8": 1.0, "int4": 0.5}
    kv = FORMS[form]
    assert info["kv_bytes_per_token"] == numbers * size[kv] + scales[kv]


def test_no_division_of_a_prompt_changes_a_bit(folder: Path) -> None:
    with slmtvm.load(folder / "int4.slm") as session:
        want = session.eval_all(TOKENS)
        for size in (1, 7, 40):
            session.reset()
            parts = [session.eval(TOKENS[i : i + size]) for i in range(0, CONTEXT, size)]
            ends = [min(i + size, CONTEXT) - 1 for i in range(0, CONTEXT, size)]
            np.testing.assert_array_equal(np.stack(parts), want[ends])
    with slmtvm.load(folder / "int4.slm", threads=3, all_threads=True) as session:
        np.testing.assert_array_equal(session.eval_all(TOKENS), want)
    with closing(Model(folder / "int4.slm")) as model, ExitStack() as stack:
        sessions = [stack.enter_context(Session(model)) for _ in range(3)]
        for step in range(20):
            got = Session.eval_batch(sessions, np.full(3, TOKENS[step]))
            np.testing.assert_array_equal(got, np.repeat(want[step : step + 1], 3, axis=0))


def test_every_target_has_the_same_bits(folder: Path, tmp_path: Path) -> None:
    with slmtvm.load(folder / "int4.slm") as session:
        want = session.eval_all(TOKENS[:20])
    targets = map(Target.load, TARGETS_OF_THREE)
    opened = [open_sessions(folder / "int4.slm", target, tmp_path) for target in targets]
    for session in itertools.chain.from_iterable(opened):
        got = session.eval_together(TOKENS[:20], 20)
        np.testing.assert_array_equal(got, want, err_msg=f"{session.target.name} {session.cpu}")
