"""Sessions of the demo model compute the same bits together as each computes alone."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from slmtvm.runtime import Model, Session
from slmtvm.target import Target
from tests.emulation.session import open_sessions
from tests.end_to_end.bundles import (
    CACHES,
    TARGETS_OF_THREE,
    bundle_for,
    bundle_of_all_targets,
)
from tests.models import heldout_ids

SESSIONS = 7
STEPS = 4


def compare(bundle: Path, threads: int) -> None:
    rng = np.random.default_rng(threads)
    with ExitStack() as stack:
        model = Model(bundle, threads=threads, all_threads=True)
        stack.callback(model.close)
        assert model.info["batches"]
        together, alone = (
            [stack.enter_context(Session(model)) for _ in range(SESSIONS)] for _ in range(2)
        )
        ids = heldout_ids()
        for pair in zip(together, alone, strict=True):
            begin, length = rng.integers(0, 200), rng.integers(1, 40)
            for session in pair:
                session.eval(ids[begin : begin + length])
        for _ in range(STEPS):
            chosen = rng.permutation(SESSIONS)[: rng.integers(2, SESSIONS + 1)]
            tokens = rng.choice(ids, len(chosen))
            got = Session.eval_batch([together[i] for i in chosen], tokens)
            wanted = [alone[i].eval([t]) for i, t in zip(chosen, tokens, strict=True)]
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "threads"),
    [
        ("demo", 1),
        *((form, 3) for form in [*CACHES, "demo"]),
        *(pytest.param(form, 1, marks=pytest.mark.exhaustive) for form in CACHES),
    ],
)
def test_the_bits_are_those_of_one_session(
    form: str, threads: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if form == "demo":
        compare(bundle_for(tmp_path_factory, form, TARGETS_OF_THREE), threads)
    else:
        compare(bundle_of_all_targets(tmp_path_factory, form), threads)


@pytest.mark.slow
def test_other_machines_compute_the_same_bits_together_and_alone(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    bundle = bundle_for(tmp_path_factory, "demo", TARGETS_OF_THREE)
    tokens = heldout_ids()[:18]
    target = Target.load("riscv64-rvv")
    for session in open_sessions(bundle, target, tmp_path)[:1]:
        alone = session.eval_all(tokens, 6)
        np.testing.assert_array_equal(session.eval_together(tokens, 6), alone)
