"""Attention on projections of heads."""

from __future__ import annotations

import numpy as np
import pytest

from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from slmtvm.passes.low_rank import LayerBases, LowRank
from slmtvm.passes.pipeline import fuse
from tests.passes.test_pipeline import op_counts
from tests.passes.toy import CONTEXT, HEAD_DIM, HEADS, KV_HEADS, VOCAB, Layer, decoder

TOKENS = np.random.default_rng(3).integers(0, VOCAB, CONTEXT)


def invertible(seed: int) -> LayerBases:
    """Bases of all features that change nothing, an offset aside."""
    rng = np.random.default_rng(seed)
    keys, values = (
        np.eye(HEAD_DIM) + 0.1 * rng.standard_normal((KV_HEADS, HEAD_DIM, HEAD_DIM))
        for _ in range(2)
    )
    back = np.repeat(np.linalg.inv(values), HEADS // KV_HEADS, axis=0)
    offset = np.zeros(HEADS * HEAD_DIM)
    return LayerBases(np.linalg.inv(keys).transpose(0, 2, 1), keys, values, back, offset)


def projected(model: CanonicalModel) -> CanonicalModel:
    return LowRank([invertible(i) for i in range(len(model.kv))]).apply(model)


@pytest.mark.parametrize("weights", ["f32", "int4"])
@pytest.mark.parametrize(
    "layer",
    [Layer(), Layer(q_base=0, k_base=0, window=20), Layer(norm="heads", norm_last=True, bias=True)],
    ids=["rotated", "plain", "normed_last"],
)
def test_bases_that_lose_nothing_change_nothing(weights: str, layer: Layer) -> None:
    model = decoder(weights, variants=[layer] * 2)
    want = evaluate(model, TOKENS)
    got = evaluate(projected(model), TOKENS)
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


def test_an_offset_is_added_to_what_attention_makes() -> None:
    model = decoder("f32", layers=1)
    bases = invertible(0)
    bases.offset[:] = np.random.default_rng(1).standard_normal(bases.offset.shape)
    weight = model.params["0.o.weight"] @ bases.offset.astype(np.float32)
    found = LowRank([bases]).apply(model)
    biases = [v for name, v in found.params.items() if name.endswith("kv_rank.bias")]
    np.testing.assert_allclose(biases[0], weight, rtol=1e-4, atol=1e-5)


def test_matrices_go_into_float_weights_and_stay_beside_integer_ones() -> None:
    plain = Layer(q_base=0, k_base=0)
    floats = op_counts(projected(decoder("f32", variants=[plain])), "main")
    assert "slm.head_linear" not in floats
    rotated = op_counts(projected(decoder("f32", layers=1)), "main")
    assert rotated["slm.head_linear"] == 3
    model = decoder("int4", variants=[plain])
    made = projected(model)
    assert op_counts(made, "main")["slm.head_linear"] == 4
    for name in ("0.q.weight", "0.o.weight"):
        np.testing.assert_array_equal(made.params[name], model.params[name])


def test_attention_takes_its_projections_itself() -> None:
    counts = op_counts(fuse(projected(decoder("int4", layers=3))), "body_1")
    assert counts["slm.head_linear"] == 3  # of its results
    assert counts["slm.quantized_linear"] == 3 * 4


def test_layers_without_bases_stay_as_they_are() -> None:
    model = decoder("f32", layers=2)
    made = LowRank([None, invertible(0)]).apply(model)
    assert made.kv[0] == model.kv[0]
    assert (made.kv[1].head_dim, made.kv[1].whole) == (HEAD_DIM, HEAD_DIM)
    assert op_counts(made, "main")["slm.head_linear"] == 3
