"""Which models' keys and values a float16 cache does not hold, and what is made of that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

import slmtvm
from slmtvm.importer import import_onnx
from slmtvm.ir import kv_range
from slmtvm.ir.kv_range import beyond_half
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import GraphBuilder, run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.spellings import mask_trilu

CONTEXT, VOCAB, HIDDEN = 48, 300, 24
TOKENS = np.random.default_rng(1).integers(0, VOCAB, 20)


def write(folder: Path, *, norm: bool = True, weights: float = 1.0, token: float = 1.0) -> Path:
    """A decoder whose values are ``weights`` times as large as others', and whose token 7 has an
    embedding ``token`` times as long."""
    b = GraphBuilder(np.random.default_rng(0))
    length = b.op("Shape", "input_ids", start=1, end=2)
    table = b.random.normal(size=(VOCAB, HIDDEN))
    table[7] *= token
    x = b.op("Gather", b.constant(table), "input_ids")
    y = b.op("LayerNormalization", x, b.near(1, HIDDEN), b.near(0, HIDDEN)) if norm else x
    q, k = (b.op("MatMul", y, b.weight(HIDDEN, HIDDEN)) for _ in range(2))
    v = b.op("MatMul", y, b.constant(b.random.normal(size=(HIDDEN, HIDDEN)) * weights))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1]))
    mixed = b.op("MatMul", b.op("Softmax", mask_trilu(b, scores, length), axis=-1), v)
    x = b.op("Add", x, b.op("MatMul", mixed, b.constant(np.eye(HIDDEN) / weights)))
    b.op("MatMul", x, b.weight(HIDDEN, VOCAB))
    b.nodes[-1].output[0] = "logits"
    model = b.model(
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", VOCAB])],
    )
    return save(model, folder)


@pytest.mark.parametrize("rope", ["", "rotate_half"])
@pytest.mark.parametrize("norm", ["rms_rsqrt", "layer_spelled"])
def test_weights_after_a_norm_bound_what_is_cached(
    rope: str, norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Tiny(rope=rope, norm=norm, layers=2, bias=True, packed_qkv="parts")
    model = import_onnx(save(build(tiny), tmp_path), context=CONTEXT)
    largest = 0.0

    def observe(keys: np.ndarray, values: np.ndarray) -> None:
        nonlocal largest
        largest = max(largest, float(np.abs(keys).max()), float(np.abs(values).max()))

    evaluate(model, np.arange(CONTEXT), observe=observe)
    bounds = kv_range._Bounds(model)
    assert not bounds.below(largest)
    assert bounds.below(20 * largest)  # not so far off that it says nothing
    monkeypatch.setattr(kv_range, "evaluate", None)  # no token is needed
    assert beyond_half(model) == 0.0


def test_large_weights_are_seen(tmp_path: Path) -> None:
    model = import_onnx(write(tmp_path, weights=2e4), context=CONTEXT)
    assert 1e5 < beyond_half(model) < 1e7


@pytest.mark.parametrize(("size", "beyond"), [(1e3, False), (1e6, True), (1e38, True)])
def test_a_token_of_a_long_embedding_is_among_the_probes(
    size: float, beyond: bool, tmp_path: Path
) -> None:
    model = import_onnx(write(tmp_path, norm=False, token=size), context=CONTEXT)
    assert 7 in kv_range.probing_tokens(model, "main")
    assert (beyond_half(model) > kv_range.LARGEST_HALF) == beyond


def test_an_encoder_caches_nothing(tmp_path: Path) -> None:
    model = import_onnx(save(build(Tiny(mask="none")), tmp_path), context=CONTEXT)
    assert model.kind == "encoder" and beyond_half(model) == 0.0


@pytest.mark.slow
def test_the_cache_is_float32_where_float16_does_not_hold_it(tmp_path: Path) -> None:
    file, wanted = write(tmp_path, weights=2e4), None
    for kv in (None, "f16"):
        # Where float16 is asked for all the same, the check would refuse it.
        bundle = slmtvm.compile(
            file, output=tmp_path / f"{kv}.slm", context=CONTEXT, kv=kv, check=kv is None
        )
        model = bundle.manifest.model
        assert (model["kv"], model["kv_beyond_f16"]) == (kv or "f32", True)
    wanted = run_onnxruntime(file, TOKENS)
    with slmtvm.load(tmp_path / "None.slm") as session:
        got = session.eval_all(TOKENS)
    assert np.abs(got - wanted).max() <= 2e-5 * np.ptp(wanted)
    assert any("beyond float16" in note for note in slmtvm.inspect(file).notes)


@pytest.mark.slow
def test_nothing_is_said_where_float16_holds_the_cache(tmp_path: Path) -> None:
    file = write(tmp_path)
    bundle = slmtvm.compile(file, output=tmp_path / "b.slm", context=CONTEXT)
    assert bundle.manifest.model["kv"] == "default"
    assert not any("float16" in note for note in slmtvm.inspect(file).notes)
