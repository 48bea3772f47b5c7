"""Decoded tokens that end early: what they say, and what later tokens see of them."""

from __future__ import annotations

import itertools
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

import slmtvm
from slmtvm.bundle.write import write_bundle
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate, evaluate_function
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.runtime.model import Model
from slmtvm.runtime.session import Session
from slmtvm.target import Target
from tests.emulation.session import open_sessions
from tests.end_to_end.bundles import TARGETS_OF_THREE
from tests.passes.toy import VOCAB
from tests.passes.toy_exits import LAYERS, exiting, quiet_decoder

pytestmark = pytest.mark.slow

TOKENS = np.random.default_rng(6).integers(0, VOCAB, 60)
ALWAYS, SOMETIMES, NEVER = "always.slm", "sometimes.slm", "never.slm"


def write(folder: Path, name: str, model: CanonicalModel, targets: tuple[str, ...]) -> None:
    fused = fuse(model)
    info = {"exits": [{"layer": e.layer, "name": e.name, "margin": e.margin} for e in model.exits]}
    loaded = [Target.load(target) for target in targets]
    # float32 everywhere: targets differ in what they keep by default.
    plans = [(t, build_plan(lower(fused, t, "float32"), info)) for t in loaded]
    write_bundle(folder / name, plans)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("exits")
    write(made, ALWAYS, exiting(quiet_decoder(), {2: 0.0}), ("host",))
    write(made, NEVER, exiting(quiet_decoder(), {2: 1e30}), ("host",))
    margins = {1: 0.6, 2: 0.3}
    write(made, SOMETIMES, exiting(quiet_decoder("int4", 0.3), margins), TARGETS_OF_THREE)
    return made


def one_by_one(session: Session, tokens: np.ndarray) -> tuple[np.ndarray, list[int]]:
    rows, taken = [], []
    for token in tokens:
        rows.append(session.eval([int(token)]))
        taken.append(session.exit_taken)
    return np.stack(rows), taken


def test_a_token_that_ends_has_the_logits_of_its_exit(folder: Path) -> None:
    cut = exiting(quiet_decoder(), {2: 0.0})
    rows = evaluate_function(cut, "stem0", TOKENS.astype(np.int32))
    wanted = evaluate_function(cut, "exithead0", rows)
    with slmtvm.load(folder / ALWAYS) as session:
        got, taken = one_by_one(session, TOKENS)
    assert taken == [1] * len(TOKENS)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_skipped_layers_keep_what_they_make_of_the_row_that_it_ended_with(folder: Path) -> None:
    """Layer by layer in numpy, the rows of earlier tokens held as they ended."""
    single = exiting(quiet_decoder(), dict.fromkeys(range(1, LAYERS), 0.0))
    rows = evaluate_function(single, "stem0", TOKENS.astype(np.int32))
    rows = evaluate_function(single, "stem1", rows)
    for index in range(2, LAYERS):
        rows = np.concatenate([rows[:-1], evaluate_function(single, f"stem{index}", rows)[-1:]])
    # The last layer is followed by the norm and the head, as at any exit.
    wanted = evaluate_function(single, "exithead0", rows)[-1]
    with slmtvm.load(folder / ALWAYS) as session:
        one_by_one(session, TOKENS[:-1])
        session.use_exits(False)
        got = session.eval(TOKENS[-1:])
        assert session.exit_taken == 0
        whole = evaluate(quiet_decoder(), TOKENS)[-1]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(got - whole).max() > 100 * np.abs(got - wanted).max()


def test_what_no_token_takes_changes_no_bit(folder: Path) -> None:
    with slmtvm.load(folder / NEVER) as session:
        wanted = session.eval_all(TOKENS)
        session.reset()
        got, taken = one_by_one(session, TOKENS)
        assert taken == [0] * len(TOKENS)
        np.testing.assert_array_equal(got, wanted)


def test_prompts_and_whole_sessions_run_all_layers(folder: Path) -> None:
    with slmtvm.load(folder / NEVER) as session:
        wanted = session.eval_all(TOKENS)
    with slmtvm.load(folder / ALWAYS) as session:
        for size in (2, 17, 60):
            session.reset()
            parts = [session.eval(TOKENS[i : i + size]) for i in range(0, 60 - size % 2, size)]
            ends = np.arange(size, 61, size)[: len(parts)] - 1
            np.testing.assert_array_equal(np.stack(parts)[: len(ends)], wanted[ends])
            assert session.exit_taken == 0
        session.reset()
        session.use_exits(False)
        np.testing.assert_array_equal(one_by_one(session, TOKENS)[0], wanted)
        session.use_exits(True)
        session.reset()
        np.testing.assert_array_equal(session.eval_all(TOKENS[:1]), wanted[:1])


def test_tokens_end_where_they_are_sure_on_all_threads_and_together(folder: Path) -> None:
    with slmtvm.load(folder / SOMETIMES) as session:
        wanted, taken = one_by_one(session, TOKENS)
        assert set(taken) == {0, 1, 2}
        session.seek(20)
        again, same = one_by_one(session, TOKENS[20:])
        np.testing.assert_array_equal(again, wanted[20:])
        assert same == taken[20:]
        most = np.sort(wanted, axis=1)
        ended = np.array(taken)
        assert (most[ended == 1, -1] - most[ended == 1, -2] >= 0.6).all()
        session.reset()
        session.eval(TOKENS[:1])
        assert session.sample() == wanted[0].argmax()
    with slmtvm.load(folder / SOMETIMES, threads=3, all_threads=True) as session:
        np.testing.assert_array_equal(one_by_one(session, TOKENS)[0], wanted)
    with closing(Model(folder / SOMETIMES)) as model, ExitStack() as stack:
        sessions = [stack.enter_context(Session(model)) for _ in range(3)]
        for step in range(20):
            got = Session.eval_batch(sessions, np.full(3, TOKENS[step]))
            np.testing.assert_array_equal(got, np.repeat(wanted[step : step + 1], 3, axis=0))


def test_every_target_ends_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    with slmtvm.load(folder / SOMETIMES) as session:
        wanted, _ = one_by_one(session, TOKENS[:20])
    targets = map(Target.load, TARGETS_OF_THREE)
    opened = [open_sessions(folder / SOMETIMES, target, tmp_path) for target in targets]
    for session in itertools.chain.from_iterable(opened):
        got = session.eval_together(TOKENS[:20], 20)
        np.testing.assert_array_equal(got, wanted, err_msg=f"{session.target.name} {session.cpu}")
