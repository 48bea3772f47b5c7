"""What a session promises whatever it computes: chunks, seeking and threads change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import slmtvm
from tests.end_to_end.bundles import bundle_for
from tests.models import heldout_ids

# form of the demo model, kind of KV cache
CASES = [("demo", "f16"), ("demo", "int8"), ("float32", "f32"), ("int8_per_channel", None)]
TOKENS = 150  # one chunk of 128 and some


@pytest.fixture(
    scope="module",
    params=[CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])],
    ids=lambda case: f"{case[0]}-{case[1]}",
)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    form, kv = request.param
    return bundle_for(tmp_path_factory, form, ("host",), kv)


@pytest.mark.slow
def test_a_prompt_in_chunks_gives_the_bits_of_one_token_at_a_time(bundle: Path) -> None:
    tokens = heldout_ids()[:TOKENS]
    with slmtvm.load(bundle) as session:
        at_once = session.eval_all(tokens)
        session.reset()
        singly = np.stack([session.eval(tokens[i : i + 1]) for i in range(TOKENS)])
    np.testing.assert_array_equal(at_once, singly)


def test_seeking_back_and_evaluating_again_equals_a_fresh_run(bundle: Path) -> None:
    tokens = heldout_ids()[: 2 * TOKENS]
    prefix, discarded, suffix = tokens[:70], tokens[70:200], tokens[200:290]
    with slmtvm.load(bundle) as session:
        session.eval(prefix)
        session.eval(discarded)
        session.seek(len(prefix))
        assert session.position == len(prefix)
        again = session.eval_all(suffix)
        session.reset()
        fresh = session.eval_all(np.concatenate([prefix, suffix]))[len(prefix) :]
    np.testing.assert_array_equal(again, fresh)


@pytest.mark.parametrize("threads", [2, 3])
def test_results_do_not_depend_on_the_number_of_threads(bundle: Path, threads: int) -> None:
    tokens = heldout_ids()[:TOKENS]
    with slmtvm.load(bundle, threads=1) as session:
        wanted = session.eval_all(tokens)
        follow = session.eval(tokens[:1])
    with slmtvm.load(bundle, threads=threads, all_threads=True) as session:
        np.testing.assert_array_equal(session.eval_all(tokens), wanted)
        np.testing.assert_array_equal(session.eval(tokens[:1]), follow)
