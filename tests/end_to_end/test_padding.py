"""Chunks are padded with token 0, whatever numbers that token has: no other row changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

import slmtvm
from tests.importer.graph_builder import GraphBuilder, run_onnxruntime, save
from tests.importer.spellings import mask_trilu

CONTEXT, VOCAB, HIDDEN = 48, 40, 24
TOKENS = np.random.default_rng(1).integers(1, VOCAB, 21)


def write(folder: Path, norm: bool) -> Path:
    """A decoder whose first token's embedding is of about 3e38, with a norm before it or not."""
    b = GraphBuilder(np.random.default_rng(0))
    length = b.op("Shape", "input_ids", start=1, end=2)
    table = b.random.normal(size=(VOCAB, HIDDEN))
    table[0] *= 1e38
    x = b.op("Gather", b.constant(table), "input_ids")
    y = b.op("LayerNormalization", x, b.near(1, HIDDEN), b.near(0, HIDDEN)) if norm else x
    q, k, v = (b.op("MatMul", y, b.weight(HIDDEN, HIDDEN)) for _ in range(3))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1]))
    weights = b.op("Softmax", mask_trilu(b, scores, length), axis=-1)
    x = b.op("Add", x, b.op("MatMul", weights, v))
    b.op("MatMul", x, b.weight(HIDDEN, VOCAB))
    b.nodes[-1].output[0] = "logits"
    model = b.model(
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", VOCAB])],
    )
    return save(model, folder)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [True, False])
def test_what_padded_rows_compute_stays_with_them(norm: bool, tmp_path: Path) -> None:
    file = write(tmp_path, norm)
    slmtvm.compile(file, output=tmp_path / "b.slm", context=CONTEXT, kv="f32")
    wanted = run_onnxruntime(file, TOKENS)
    with slmtvm.load(tmp_path / "b.slm") as session:
        by_one = np.concatenate([session.eval_all([token]) for token in TOKENS])
        session.seek(0)
        for division in ((21,), (5, 16), (16, 5), (3, 7, 11)):
            parts, at = [], 0
            for count in division:
                parts.append(session.eval_all(TOKENS[at : at + count]))
                at += count
            np.testing.assert_array_equal(np.concatenate(parts), by_one)
            # What a forgotten sequence has left is padding to the next one.
            session.seek(0)
            session.eval([0] * CONTEXT)
            session.seek(0)
    assert np.abs(by_one - wanted).max() <= 2e-5 * np.ptp(wanted)
