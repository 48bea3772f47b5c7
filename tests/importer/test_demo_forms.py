"""The demo model in every form that exporters and quantizers write."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import run_onnxruntime
from tests.importer.test_import_spellings import calls_of, op_names
from tests.models.forms import FORMS, model_path
from tests.models.pycode import heldout_ids

LAYER = [
    "slm.rms_norm", "slm.linear", "slm.linear", "slm.linear", "slm.rope", "slm.rope",
    "slm.attention", "slm.linear", "relax.add",
    "slm.rms_norm", "slm.linear", "slm.linear", "relax.nn.silu", "relax.multiply", "slm.linear",
    "relax.add",
]  # fmt: skip
EXACT = ("float32", "with_past", "int4_float_activations")
TOLERANCE = 2e-4  # of the logits' range
# Where activations are rounded to int8, a last bit anywhere flips a rounding somewhere, and that
# changes logits by some thousandths of their range.
FLIP = 2e-2
TOKENS = 40


@cache
def imported(form: str) -> CanonicalModel:
    """A form as it is imported; no test changes it."""
    return import_onnx(model_path(form))


def kl(reference: np.ndarray, logits: np.ndarray) -> float:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return (
            x
            - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))
            - x.max(1, keepdims=True)
        )

    p, q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_ops_in_the_same_order(form):
    model = imported(form)
    expected = ["slm.embedding", *LAYER * 6, "slm.rms_norm", "slm.linear"]
    assert op_names(model) == expected
    assert (model.kind, model.family, model.context) == ("decoder", "llama", 1024)
    assert (model.vocab_size, model.hidden_size, model.num_heads) == (4096, 256, 8)
    assert [(s.num_kv_heads, s.head_dim) for s in model.kv] == [(4, 32)] * 6
    assert model.notes == ()
    layers = [int(c.attrs["layer"]) for c in calls_of(model, "slm.attention")]
    assert layers == list(range(6))


@pytest.mark.parametrize("form", EXACT)
def test_exact_forms_compute_what_onnxruntime_computes(form):
    tokens = heldout_ids()[:TOKENS]
    want = run_onnxruntime(model_path(form), tokens)
    got = evaluate(imported(form), tokens)
    assert np.abs(got - want).max() <= TOLERANCE * np.ptp(want)


@pytest.mark.slow
@pytest.mark.parametrize("form", [f for f in FORMS if f not in EXACT])
def test_quantized_forms_stay_near_onnxruntime(form):
    tokens = heldout_ids()[:TOKENS]
    want = run_onnxruntime(model_path(form), tokens)
    got = evaluate(imported(form), tokens)
    # onnxruntime gives all rows of a dynamic int8 product one scale, the canonical op one each.
    assert kl(want, got) < (1e-2 if form.startswith("int8") else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("form", [f for f in FORMS if f not in EXACT])
def test_a_single_token_of_a_quantized_form_is_exact_but_for_rounding_flips(form):
    path = model_path(form)
    model = imported(form)
    errors = []
    for token in heldout_ids()[100:116]:
        want = run_onnxruntime(path, np.array([token]))
        errors.append(np.abs(evaluate(model, [token]) - want).max() / np.ptp(want))
    assert np.median(errors) <= TOLERANCE
    assert max(errors) <= FLIP


def formats(model: CanonicalModel) -> set[tuple[str, str, str, int]]:
    return {
        (layer.kind, layer.format, str(call.attrs["activation"]), layer.group_size)
        for layer, call in zip(
            [x for x in model.layers if x.kind == "linear"],
            calls_of(model, "slm.linear"),
            strict=True,
        )
    }


@pytest.mark.parametrize(
    ("form", "embedding", "linear"),
    [
        ("float32", "f32", {("linear", "f32", "f32", 0)}),
        ("with_past", "f32", {("linear", "f32", "f32", 0)}),
        ("int4", "f32", {("linear", "int4", "block", 32)}),
        ("int4_asymmetric", "f32", {("linear", "int4", "block", 32)}),
        ("int4_float_activations", "f32", {("linear", "int4", "f32", 32)}),
        ("int4_float_head", "f32", {("linear", "int4", "block", 32), ("linear", "f32", "f32", 0)}),
        ("with_past_int4", "f32", {("linear", "int4", "block", 32)}),
        ("int8", "int8", {("linear", "int8", "row_u8", 0)}),
        ("int8_tied_head", "int8", {("linear", "int8", "row_u8", 0), ("linear", "int8", "f32", 0)}),
        ("demo", "int4", {("linear", "int4", "block", 32)}),
    ],
)
def test_weights_keep_the_format_of_the_file(form, embedding, linear):
    model = imported(form)
    assert formats(model) == linear
    assert model.layers[0].format == embedding
    for call in calls_of(model, "slm.linear"):
        has_zero_points = "zero_points" in str(call.attrs["operands"])
        assert has_zero_points == (form == "int4_asymmetric") or form.startswith("int8")


@pytest.mark.parametrize("form", FORMS)
def test_the_rotary_tables_are_the_formula_s(form):
    model = import_onnx(model_path(form), context=300)
    angles = np.arange(300)[:, None] * 10000.0 ** (-np.arange(16) / 16)
    assert np.allclose(model.params["rope.cos"], np.cos(angles), atol=2e-4)
    assert np.allclose(model.params["rope.sin"], np.sin(angles), atol=2e-4)
    assert sum("rope" in name for name in model.params) == 2


@pytest.mark.parametrize("form", ["float32", "int8_tied_head"])
def test_a_tied_head_is_stored_once(form):
    model = imported(form)
    table = calls_of(model, "slm.embedding")[0].args[1]
    assert calls_of(model, "slm.linear")[-1].args[1].same_as(table)
