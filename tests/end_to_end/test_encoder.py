"""all-MiniLM-L6-v2, compiled for every CPU target, against onnxruntime on its file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from slmtvm.compiler import compile_model
from slmtvm.target import Target
from slmtvm.verify.exact_sums import exact_session
from tests.emulation.session import open_sessions
from tests.end_to_end.bundles import RUNNABLE, TARGETS_OF_THREE
from tests.machines import is_native
from tests.models.encoder import ENCODER_FORMS, encoder_path

# Wordpiece ids of a sentence: odd lengths, shorter than the bucket they run in.
_SENTENCE = (101, 1037, 4937, 7719, 2006, 1996, 13523, 2096, 1996, 3899, 25126, 2012, 2009, 102)
LENGTHS = (14, 5, 45)
MIN_COSINE = 0.999
# Float rows agree to their last bits. Of int8 rows a rounding step that falls the other way moves a
# row by more (onnxruntime's own optimized graph parts from the file as far), not the sentence.
MIN_ROW_COSINE = {"float32": 1 - 1e-6, "int8": 0.99}
CONTEXT = 64
EMULATED = "int8"  # the form that is also run on other machines: all compute the same bits


def _tokens(length: int) -> np.ndarray:
    return np.resize(np.array(_SENTENCE, np.int32), length)


def _wanted(path: Path, tokens: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = exact_session(path, options)
    ids = np.asarray(tokens, np.int64)[None]
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids * 0}
    return session.run(["last_hidden_state"], feed)[0][0]


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine of the angle between each row of a and the same row of b."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / norms


@pytest.mark.slow
@pytest.mark.parametrize("form", ENCODER_FORMS)
def test_sentences_and_their_tokens_point_where_onnxruntimes_do(form: str, tmp_path: Path) -> None:
    path = encoder_path(form)
    bundle = tmp_path / "minilm.slm"
    names = RUNNABLE if "SLMTVM_EXHAUSTIVE" in os.environ else TARGETS_OF_THREE
    targets = [Target.load(name) for name in names]
    if form != EMULATED and "SLMTVM_EXHAUSTIVE" not in os.environ:
        targets = [target for target in targets if is_native(target)]
    compile_model(path, targets, output=bundle, context=CONTEXT)
    for target in targets:
        name, native = target.name, is_native(target)
        for session in open_sessions(bundle, target, tmp_path):
            for length in LENGTHS if native or "SLMTVM_EXHAUSTIVE" in os.environ else LENGTHS[:1]:
                tokens = _tokens(length)
                got, wanted = session.encode(tokens, CONTEXT), _wanted(path, tokens)
                rows = float(_cosines(got, wanted).min())
                sentence = float(_cosines(got.mean(0), wanted.mean(0)))
                print(f"minilm {form} on {name} ({session.cpu or 'native'}), {length} tokens: "
                      f"cosine of rows {rows:.6f}, of the sentence {sentence:.6f}")  # fmt: skip
                assert rows > MIN_ROW_COSINE[form], (name, session.cpu, length)
                assert sentence > MIN_COSINE, (name, session.cpu, length)
