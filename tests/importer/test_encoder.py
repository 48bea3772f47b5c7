"""all-MiniLM-L6-v2, as torch exports it and as onnxruntime quantizes it."""

from __future__ import annotations

import numpy as np
import pytest

from slmtvm.importer import import_onnx
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import run_onnxruntime
from tests.importer.test_import_spellings import op_names
from tests.models.encoder import ENCODER_FORMS, encoder_path

LAYER = [
    "slm.linear", "slm.linear", "slm.linear", "slm.attention", "slm.linear", "relax.add",
    "slm.layer_norm", "slm.linear", "relax.nn.gelu", "slm.linear", "relax.add", "slm.layer_norm",
]  # fmt: skip
TOKENS = np.array([101, 1996, 4248, 2829, 4419, 14523, 2058, 1996, 13971, 3899, 1012, 102])


@pytest.mark.slow
@pytest.mark.parametrize("form", ENCODER_FORMS)
def test_an_encoder_has_bidirectional_attention_and_position_rows(form):
    model = import_onnx(encoder_path(form))
    names = op_names(model)
    # The words', the positions' and the segments' rows.
    assert sorted(names[:6]) == [
        "relax.add", "relax.add", "slm.embedding", "slm.embedding", "slm.position_rows",
        "slm.segments",
    ]  # fmt: skip
    assert names[6:] == ["slm.layer_norm", *LAYER * 6]
    assert (model.kind, model.family, model.context) == ("encoder", "bert", 512)
    assert (model.vocab_size, model.hidden_size, model.num_heads) == (30522, 384, 12)


@pytest.mark.slow
def test_the_float_encoder_computes_what_onnxruntime_computes():
    path = encoder_path("float32")
    want = run_onnxruntime(path, TOKENS)
    got = evaluate(import_onnx(path), TOKENS)
    assert np.abs(got - want).max() <= 2e-4 * np.ptp(want)


@pytest.mark.slow
def test_the_int8_encoder_quantizes_all_rows_together_as_its_file_does():
    path = encoder_path("int8")
    want = run_onnxruntime(path, TOKENS)
    got = evaluate(import_onnx(path), TOKENS)
    cosine = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    assert cosine.min() > 0.999
