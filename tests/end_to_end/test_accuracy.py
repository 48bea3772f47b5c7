"""Every form of the demo model, compiled for every CPU target, against onnxruntime on its file.

SLMTVM_EXHAUSTIVE=1 evaluates the whole held-out text and all prompts on every target, for hours.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from slmtvm.target import Target
from tests.emulation.session import EmulatedSession, open_sessions
from tests.end_to_end.bundles import CPU_TARGETS, bundle_for, bundle_of_all_targets
from tests.end_to_end.reference import mean_kl, perplexity, reference
from tests.machines import is_native, lacking
from tests.models import FORMS, heldout_ids, prompt_ids

WINDOW = 256
FLOAT_FORMS = ("float32", "with_past")
# nats; the bound where the file quantizes activations, or we do (w4a8).
MAX_KL = {form: 1e-3 if form in FLOAT_FORMS else 1e-2 for form in FORMS}
MAX_PERPLEXITY_RATIO = 1.01
MIN_TOKENS_FOR_PERPLEXITY = 6000  # with fewer its own noise is more than that
FLOAT_NOISE = 1e-3  # largest logit difference of two float32 evaluations in another order

Sessions = list[EmulatedSession]


# The form that is also run on the targets of other machines: all targets compute the same bits.
EMULATED = "int4_asymmetric"
# They differ in the file, or in one layer: tests/importer shows that the same ops come of them.
LIKE_OTHERS = ("with_past", "with_past_int4", "int4_float_head")
NATIVE = tuple(name for name in CPU_TARGETS if is_native(Target.load(name)))


def _compiled(form: str, target: str) -> object:
    chosen = form == EMULATED or (target in NATIVE and form not in LIKE_OTHERS)
    marks = [] if chosen else [pytest.mark.exhaustive]
    return pytest.param((form, target), id=f"{form}-{target}", marks=marks)


@pytest.fixture(scope="module", params=[_compiled(f, t) for f in FORMS for t in CPU_TARGETS])
def compiled(request: pytest.FixtureRequest) -> tuple[str, str]:
    form, target = request.param
    return form, target


@pytest.fixture(scope="module")
def form(compiled: tuple[str, str]) -> str:
    return compiled[0]


@pytest.fixture(scope="module")
def sessions(compiled: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    """A session for each CPU that stands for the target."""
    form, target = compiled
    if reason := lacking(Target.load(target)):
        pytest.skip(reason)
    if form == EMULATED:
        path = bundle_of_all_targets(tmp_path_factory, form)
    else:
        path = bundle_for(tmp_path_factory, form, (target,))
    return open_sessions(path, Target.load(target), tmp_path_factory.mktemp("program"))


@dataclass(frozen=True)
class Effort:
    """How much text a test evaluates: emulation is a hundred times slower than this machine."""

    tokens: int  # of held-out text
    window: int
    prompts: int
    new_tokens: int


def _effort(form: str, sessions: Sessions) -> Effort:
    if "SLMTVM_EXHAUSTIVE" in os.environ:
        return Effort(len(heldout_ids()) // 256 * 256, 256, len(prompt_ids()), 64)
    if is_native(sessions[0].target):
        # Enough of the text for its perplexity to mean something, where layers of all kinds are.
        return Effort(24 * 256, 256, 2, 64) if form == EMULATED else Effort(6 * 256, 256, 1, 32)
    return Effort(48, 48, 1, 12)


@lru_cache(maxsize=2)  # forms are tested one after another
def _wanted(form: str, tokens: int, window: int) -> np.ndarray:
    windows = heldout_ids()[:tokens].reshape(-1, window)
    return np.concatenate([reference(form).logits(w) for w in windows])


@lru_cache(maxsize=16)
def _wanted_greedy(form: str, prompt: tuple[int, ...], count: int) -> tuple[list[int], list[float]]:
    return reference(form).greedy(prompt, count)


@pytest.mark.slow
def test_logits_and_perplexity_agree_with_onnxruntime(form: str, sessions: Sessions) -> None:
    effort = _effort(form, sessions)
    ids = heldout_ids()[: effort.tokens + 1]
    wanted = _wanted(form, effort.tokens, effort.window)
    for session in sessions:
        got = session.eval_all(ids[:-1], effort.window)
        kl = mean_kl(wanted, got)
        assert kl < MAX_KL[form]
        ratio = perplexity(got, ids[1:]) / perplexity(wanted, ids[1:])
        record(form, session, kl=kl, perplexity=perplexity(got, ids[1:]), ratio=ratio)
        if effort.tokens >= MIN_TOKENS_FOR_PERPLEXITY:
            assert 1 / MAX_PERPLEXITY_RATIO < ratio < MAX_PERPLEXITY_RATIO


@pytest.mark.slow
def test_greedy_tokens_are_those_of_onnxruntime_up_to_the_forms_own_noise(
    form: str, sessions: Sessions
) -> None:
    effort = _effort(form, sessions)
    for prompt in prompt_ids()[: effort.prompts]:
        wanted, leads = _wanted_greedy(form, prompt, effort.new_tokens)
        for session in sessions:
            got = session.greedy(np.array(prompt), effort.new_tokens)
            parted = [i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b]
            record(form, session, greedy_equal=parted[0] if parted else effort.new_tokens)
            if parted:
                context = np.array([*prompt, *wanted[: parted[0]]])
                assert leads[parted[0]] < _noise(form, context), (prompt, parted[0])


def record(form: str, session: EmulatedSession, **numbers: float) -> None:
    """Print what was measured; an exhaustive run keeps it with pytest's -rP."""
    values = ", ".join(f"{name} {value:.6g}" for name, value in numbers.items())
    print(f"{form} on {session.target.name} ({session.cpu or 'native'}): {values}")


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
