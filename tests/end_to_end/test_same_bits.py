"""A model computes the same logits, to the last bit, on every kind of CPU.

So what is measured of a model's accuracy on one machine holds for all of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slmtvm.compiler import compile_model
from slmtvm.target import Target
from tests.emulation.session import open_sessions
from tests.end_to_end.bundles import CACHES, RUNNABLE, bundle_of_all_targets
from tests.importer.heads import ENCODERS, VOCAB, save_head
from tests.models import heldout_ids

TOKENS = 17  # a chunk of 16 and a single token


@pytest.mark.slow
@pytest.mark.parametrize("form", CACHES)
def test_every_target_computes_the_same_bits(
    form: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    bundle = bundle_of_all_targets(tmp_path_factory, form)
    tokens = heldout_ids()[:TOKENS]
    computed = {
        f"{target.name} {session.cpu}": session.eval_all(tokens, TOKENS)
        for target in map(Target.load, RUNNABLE)
        for session in open_sessions(bundle, target, tmp_path)
    }
    first = next(iter(computed.values()))
    for where, logits in computed.items():
        np.testing.assert_array_equal(logits, first, err_msg=where)


@pytest.mark.slow
@pytest.mark.parametrize(
    "head",
    [
        pytest.param("classifier", marks=pytest.mark.exhaustive),  # a row and a linear layer
        "tokens_and_embedding",
        pytest.param("max_embedding", marks=pytest.mark.exhaustive),
    ],
)
def test_every_target_computes_the_same_bits_of_what_is_pooled(head: str, tmp_path: Path) -> None:
    bundle = tmp_path / "x.slm"
    compile_model(save_head(ENCODERS[head], tmp_path), RUNNABLE, output=bundle)
    tokens = np.random.default_rng(0).integers(2, VOCAB, TOKENS)
    computed = {
        f"{target.name} {session.cpu} {threads}": session.outputs(tokens, threads)
        for target in map(Target.load, RUNNABLE)
        for session in open_sessions(bundle, target, tmp_path)
        for threads in (1, 3)
    }
    first = next(iter(computed.values()))
    for where, outputs in computed.items():
        np.testing.assert_array_equal(outputs, first, err_msg=where)
