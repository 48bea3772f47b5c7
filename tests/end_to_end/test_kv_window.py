"""Layers with a window keep no more positions than it: the same bits, in less memory."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

import slmtvm
from slmtvm.bench import bench
from slmtvm.bundle.write import write_bundle
from slmtvm.errors import DeviceError
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.runtime.model import Model
from slmtvm.runtime.session import Session
from slmtvm.target import Target
from tests.passes import toy
from tests.passes.toy import VOCAB, Layer

pytestmark = pytest.mark.slow

CONTEXT = 700
LAYERS = (Layer(window=21), Layer(), Layer(chunk=30), Layer(window=60))
RING = 160 + 16  # of the first layer: 20 positions before a step of 128 rows, in whole blocks
TOKENS = np.random.default_rng(2).integers(0, VOCAB, CONTEXT)
WHOLE, KEPT = "all.slm", "window.slm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("windows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "CONTEXT", CONTEXT)
        fused, target = fuse(toy.decoder("f32", variants=LAYERS)), Target.load("host")
    for name, keep in ((WHOLE, "all"), (KEPT, "window")):
        plan = build_plan(lower(fused, target, "int8", keep=keep), {})
        write_bundle(made / name, [(target, plan)])
    return made


@pytest.fixture(scope="module")
def wanted(folder: Path) -> np.ndarray:
    with slmtvm.load(folder / WHOLE) as session:
        assert session.info["kv_window"] is None
        return session.eval_all(TOKENS)


def test_a_prompt_in_any_division_has_the_bits_of_a_whole_cache(
    folder: Path, wanted: np.ndarray
) -> None:
    rng = np.random.default_rng(3)
    cuts = np.sort(rng.choice(np.arange(1, CONTEXT), 9, replace=False))
    for threads in (1, 3):
        with slmtvm.load(folder / KEPT, threads=threads, all_threads=True) as session:
            np.testing.assert_array_equal(session.eval_all(TOKENS), wanted)
            session.reset()
            parts = [session.eval_all(part) for part in np.split(TOKENS, cuts)]
            np.testing.assert_array_equal(np.concatenate(parts), wanted)
    with slmtvm.load(folder / KEPT) as session:
        singly = [session.eval(TOKENS[i : i + 1]) for i in range(3 * RING)]
        np.testing.assert_array_equal(np.stack(singly), wanted[: 3 * RING])


def test_sessions_evaluated_together_keep_a_window_each(folder: Path, wanted: np.ndarray) -> None:
    with closing(Model(folder / KEPT)) as model, ExitStack() as stack:
        sessions = [stack.enter_context(Session(model)) for _ in range(4)]
        places = [400, 17, 2 * RING + 3, 690 - RING]
        for session, place in zip(sessions, places, strict=True):
            session.eval(TOKENS[:place])
        for step in range(RING + 5):
            now = [place + step for place in places]
            got = Session.eval_batch(sessions, TOKENS[now])
            np.testing.assert_array_equal(got, wanted[now])


def test_memory_is_that_of_the_windows(folder: Path) -> None:
    with slmtvm.load(folder / WHOLE) as whole, slmtvm.load(folder / KEPT) as kept:
        of_all, of_windows = whole.info, kept.info
    a_layer = of_all["kv_bytes_per_token"] // len(LAYERS)
    assert of_windows["kv_bytes_per_token"] == of_all["kv_bytes_per_token"]
    assert of_all["kv_bytes"] == len(LAYERS) * a_layer * 704
    # Of 21, all, 30 and 60 positions, before steps of 128.
    positions = RING + 704 + (160 + 16) + (192 + 16)
    assert of_windows["kv_bytes"] == a_layer * positions
    saved = of_all["memory"]["state"] - of_windows["memory"]["state"]
    assert saved == of_all["kv_bytes"] - of_windows["kv_bytes"]
    assert of_windows["kv_window"]["positions"] == RING
    assert of_windows["memory"]["scratch_per_thread"] <= of_all["memory"]["scratch_per_thread"]


def test_a_session_goes_back_within_the_window_and_says_where_it_ends(
    folder: Path, wanted: np.ndarray
) -> None:
    with slmtvm.load(folder / KEPT) as session:
        back = session.info["kv_window"]["seek_back"]
        assert back >= 16
        session.eval(TOKENS[:100])
        session.seek(3)  # nothing was overwritten yet
        np.testing.assert_array_equal(session.eval_all(TOKENS[3:100]), wanted[3:100])
        session.seek(0)
        for end in (300, 301, 450, 611):
            session.eval(TOKENS[session.position : end])
            session.seek(end - back)
            got = session.eval_all(TOKENS[end - back : end])
            np.testing.assert_array_equal(got, wanted[end - back : end])
        with pytest.raises(DeviceError, match=r"seen from position [0-9]+ on.*--kv-keep all"):
            session.seek(200)
        # It is where it was, and goes on.
        np.testing.assert_array_equal(session.eval(TOKENS[611:640]), wanted[639])
        session.seek(0)
        np.testing.assert_array_equal(session.eval_all(TOKENS[:50]), wanted[:50])
        session.seek(20)
        np.testing.assert_array_equal(session.eval(TOKENS[20:40]), wanted[39])


def test_a_bench_goes_back_further_than_the_window(folder: Path) -> None:
    report = bench(folder / KEPT, threads=(1,), kernels=False)
    positions = [rate.position for rate in report.rates if rate.phase == "decode"]
    assert max(positions) > 2 * RING
