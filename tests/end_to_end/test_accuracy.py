"""Every form of the demo model, compiled for every CPU target, against onnxruntime on its file."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest

from slmtvm.target import Target
from tests.emulation.session import EmulatedSession, open_sessions
from tests.end_to_end.bundles import CPU_TARGETS, bundle_for
from tests.end_to_end.reference import mean_kl, perplexity, reference
from tests.models import FORMS, heldout_ids, prompt_ids

NEW_TOKENS = 64
WINDOW = 256
FLOAT_FORMS = ("float32", "with_past")
# nats; the bound where the file quantizes activations, or we do (w4a8).
MAX_KL = {form: 1e-3 if form in FLOAT_FORMS else 1e-2 for form in FORMS}
MAX_PERPLEXITY_RATIO = 1.01
FLOAT_NOISE = 1e-3  # largest logit difference of two float32 evaluations in another order

Sessions = list[EmulatedSession]


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=CPU_TARGETS)
def sessions(
    form: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Sessions:
    """A session for each CPU that stands for the target."""
    path = bundle_for(tmp_path_factory, form, CPU_TARGETS)
    return open_sessions(path, Target.load(request.param), tmp_path_factory.mktemp("program"))


def _windows(sessions: Sessions) -> int:
    """Windows of held-out text that a test can afford: emulation is a hundred times slower."""
    return 24 if sessions[0].target.arch == platform.machine() else 2


@pytest.mark.slow
def test_logits_and_perplexity_agree_with_onnxruntime(form: str, sessions: Sessions) -> None:
    count = _windows(sessions) * WINDOW
    ids = heldout_ids()[: count + 1]
    windows = ids[:count].reshape(-1, WINDOW)
    wanted = np.concatenate([reference(form).logits(w) for w in windows])
    for session in sessions:
        got = session.eval_all(ids[:count], WINDOW)
        assert mean_kl(wanted, got) < MAX_KL[form]
        ratio = perplexity(got, ids[1:]) / perplexity(wanted, ids[1:])
        assert 1 / MAX_PERPLEXITY_RATIO < ratio < MAX_PERPLEXITY_RATIO


@pytest.mark.slow
def test_greedy_tokens_are_those_of_onnxruntime_up_to_the_forms_own_noise(
    form: str, sessions: Sessions
) -> None:
    for prompt in prompt_ids():
        wanted, leads = reference(form).greedy(prompt, NEW_TOKENS)
        for session in sessions:
            got = session.greedy(np.array(prompt), NEW_TOKENS)
            parted = [i for i in range(NEW_TOKENS) if got[i] != wanted[i]]
            if parted:
                context = np.array([*prompt, *wanted[: parted[0]]])
                assert leads[parted[0]] < _noise(form, context), (prompt, parted[0])


def _noise(form: str, context: np.ndarray) -> float:
    """How far quantization moves the logits after ``context``: the form's against float32's."""
    if form in FLOAT_FORMS:
        return FLOAT_NOISE
    exact = reference("float32").logits(context)[-1]
    return float(np.abs(reference(form).logits(context)[-1] - exact).max())


def test_the_demo_model_agrees_with_onnxruntime_on_this_machine(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    path = bundle_for(tmp_path_factory, "demo", ("host",))
    (session,) = open_sessions(path, Target.load("host"), tmp_path)
    ids = heldout_ids()[: 2 * WINDOW]
    wanted = np.concatenate([reference("demo").logits(w) for w in ids.reshape(-1, WINDOW)])
    assert mean_kl(wanted, session.eval_all(ids, WINDOW)) < MAX_KL["demo"]
