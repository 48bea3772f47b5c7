"""Models whose activations were quantized beforehand, against onnxruntime on the same file."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.ops import parse_roundings
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.test_import_spellings import calls_of, op_names

DECODER = Tiny(hidden=40, heads=4, kv_heads=2, head_dim=12, ffn=72, vocab=53, rope="rotate_half")
ENCODER = Tiny(
    hidden=40, heads=4, kv_heads=4, head_dim=10, ffn=72, vocab=53, learned_positions=64,
    norm="layer_operator", activation="gelu_erf", mask="none", bias=True,
)  # fmt: skip
SPELLED = replace(ENCODER, norm="layer_spelled")
ALIBI = replace(
    DECODER, heads=3, kv_heads=3, norm="layer_operator", activation="gelu_erf", rope="",
    mask="by_key",
)  # fmt: skip
TOKENS = np.array([3, 50, 7, 7, 21, 0, 52, 11, 30, 4, 4, 19])
EXACT = 2e-4  # of the logits' range
# A last bit of a float can turn a rounding elsewhere, which changes a row by a step.
FLIP = 2e-2
U8, S8, U16 = QuantType.QUInt8, QuantType.QInt8, QuantType.QUInt16


class Calibration(CalibrationDataReader):
    """A few random sequences."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self._left = [rng.integers(0, 53, (1, 12)) for _ in range(4)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return {"input_ids": self._left.pop()} if self._left else None


def quantized(tiny: Tiny, folder: Path, **options) -> Path:
    logging.getLogger().setLevel(logging.ERROR)
    source = save(build(tiny), folder, "float.onnx")
    target = folder / "quantized.onnx"
    options = {"quant_format": QuantFormat.QDQ, "weight_type": S8, **options}
    quantize_static(source, target, Calibration(), **options)
    return target


def masking(tiny: Tiny) -> list[str]:
    """The names of the nodes that a causal mask passes: rounded with it, all scores are one."""
    nodes = build(tiny).graph.node
    softmaxes = [n for n in nodes if n.op_type == "Softmax"]
    scores = {n.input[0] for n in softmaxes}
    adding = [n for n in nodes if scores.intersection(n.output)]
    making = [n for n in nodes if n.op_type in ("Trilu", "Expand")]
    return [n.name for n in (*softmaxes, *adding, *making)]


def check(path: Path, most: float = FLIP) -> CanonicalModel:
    model = import_onnx(path, context=32)
    want = run_onnxruntime(path, TOKENS)
    errors = np.abs(evaluate(model, TOKENS) - want).max(axis=1) / np.ptp(want)
    assert np.median(errors) <= EXACT
    assert errors.max() <= most
    return model


@pytest.mark.parametrize("tiny", [DECODER, ENCODER], ids=["decoder", "encoder"])
@pytest.mark.parametrize("activation", [U8, S8, U16], ids=str)
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_matrix_products_keep_their_roundings(tiny, activation, per_channel, tmp_path):
    path = quantized(
        tiny, tmp_path, activation_type=activation, per_channel=per_channel,
        op_types_to_quantize=["MatMul"],
    )  # fmt: skip
    model = check(path)
    linears = calls_of(model, "slm.linear")
    assert {str(call.attrs["format"]) for call in linears} == {"int8"}
    assert {la.activation for la in model.layers if la.kind == "linear"} == {"static"}
    (attention,) = calls_of(model, "slm.attention")
    assert str(attention.attrs["weight_roundings"])


@pytest.mark.parametrize("tiny", [ENCODER, SPELLED], ids=["operator", "spelled"])
def test_every_operator_may_be_rounded(tiny, tmp_path):
    model = check(quantized(tiny, tmp_path, activation_type=U8))
    assert len(calls_of(model, "slm.quantize_dequantize")) > 15
    (attention,) = calls_of(model, "slm.attention")
    assert str(attention.attrs["roundings"])
    norms = op_names(model).count("slm.layer_norm")
    assert norms == (3 if tiny is ENCODER else 0)
    assert any("ReduceMean" in note for note in model.notes) == (tiny is SPELLED)


@pytest.mark.parametrize(
    ("tiny", "operators"),
    [(ENCODER, None), (replace(ENCODER, activation="silu"), None), (DECODER, ["MatMul"])],
    ids=["encoder", "gated", "decoder"],
)
def test_integer_operators_keep_every_rounding(tiny, operators, tmp_path):
    path = quantized(
        tiny, tmp_path, activation_type=U8, quant_format=QuantFormat.QOperator,
        op_types_to_quantize=operators,
    )  # fmt: skip
    model = check(path, most=EXACT)
    formats = {str(call.attrs["format"]) for call in calls_of(model, "slm.linear")}
    assert formats == {"int8"}


def test_probabilities_of_an_integer_softmax_are_counted_in_whole_steps(tmp_path):
    """onnxruntime's operator multiplies by the whole part of 1 / scale."""
    path = quantized(ENCODER, tmp_path, activation_type=U8, quant_format=QuantFormat.QOperator)
    model = onnx.load(path)
    (softmax,) = [n for n in model.graph.node if n.op_type == "QLinearSoftmax"]
    scale = next(t for t in model.graph.initializer if t.name == softmax.input[3])
    scale.CopyFrom(numpy_helper.from_array(np.float32(0.0045), scale.name))
    (attention,) = calls_of(check(save(model, tmp_path)), "slm.attention")
    ((factor, *rounding),) = parse_roundings(str(attention.attrs["weight_roundings"]))
    assert factor == pytest.approx(222 * 0.0045, rel=1e-6)
    assert rounding == [pytest.approx(0.0045, rel=1e-6), 0, 255]


def test_probabilities_may_be_rounded_twice_differently(tmp_path):
    """As quantizers write it where a guard against NaN follows the softmax."""
    model = onnx.load(quantized(ENCODER, tmp_path, activation_type=U8))
    (softmax,) = [n for n in model.graph.node if n.op_type == "Softmax"]
    (first,) = [n for n in model.graph.node if softmax.output[0] in n.input]
    for name, value in (("coarse", np.float32(1 / 100)), ("none", np.uint8(0))):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    place = list(model.graph.node).index(first)
    for kind, before, after in (
        ("Dequantize", "rounded", "back"), ("Quantize", softmax.output[0], "rounded"),
    ):  # fmt: skip
        node = helper.make_node(f"{kind}Linear", [before, "coarse", "none"], [after], name=after)
        model.graph.node.insert(place, node)
    first.input[0] = "back"
    (attention,) = calls_of(check(save(model, tmp_path)), "slm.attention")
    steps = parse_roundings(str(attention.attrs["weight_roundings"]))
    assert [(step[0], step[1]) for step in steps] == [
        (1.0, pytest.approx(1 / 100)), (1.0, pytest.approx(1 / 255)),
    ]  # fmt: skip


def test_rotary_positions_are_rotated_on_integers(tmp_path):
    """Their tables are rounded constants; the embedding is read by two operators, yet one."""
    path = quantized(
        DECODER, tmp_path, activation_type=U8, quant_format=QuantFormat.QOperator,
        nodes_to_exclude=masking(DECODER),
    )  # fmt: skip
    names = op_names(check(path))
    assert names.count("slm.embedding") == 1
    assert names.count("slm.position_rows") == 4  # cosines and sines of queries and of keys
    assert "slm.rope" not in names


@pytest.mark.parametrize("mask", ["trilu", "sliced"])
def test_a_mask_in_the_range_of_scores_makes_them_coarse_and_still_hides(mask, tmp_path):
    tiny = replace(DECODER, mask=mask, rope="", learned_positions=64)
    check(quantized(tiny, tmp_path, activation_type=U8, op_types_to_quantize=["Add", "MatMul"]))


@pytest.mark.parametrize("activation", [U8, S8, U16], ids=str)
def test_scores_may_be_rounded_with_a_bias_by_key(activation, tmp_path):
    """BLOOM's: the products of slopes and positions are steps, and not the same by distance."""
    tiny = replace(ALIBI, layers=2)
    path = quantized(tiny, tmp_path, activation_type=activation, nodes_to_exclude=masking(tiny))
    for call in calls_of(check(path), "slm.attention"):
        assert call.attrs["bias_by"] == "key"
        assert len(parse_roundings(str(call.attrs["roundings"]))) == 2
        assert len(parse_roundings(str(call.attrs["sum_roundings"]))) == 1


@pytest.mark.parametrize("operators", [["MatMul"], None], ids=["products", "all"])
def test_scores_may_be_rounded_before_a_cap_and_after_it(operators, tmp_path):
    tiny = replace(DECODER, rope="", learned_positions=64, softcap=1.5)
    path = quantized(
        tiny, tmp_path, activation_type=U8, op_types_to_quantize=operators,
        nodes_to_exclude=masking(tiny),
    )  # fmt: skip
    (attention,) = calls_of(check(path), "slm.attention")
    assert float(attention.attrs["softcap"]) == pytest.approx(1.5)
    assert str(attention.attrs["roundings"])
    assert bool(str(attention.attrs["sum_roundings"])) == (operators is None)


def rounded_before(tiny: Tiny, op_type: str, added: float = 0.0) -> onnx.ModelProto:
    """``tiny`` with scores plus ``added`` rounded before the node that masks them."""
    model = build(tiny)
    (softmax,) = [n for n in model.graph.node if n.op_type == "Softmax"]
    (masked,) = [n for n in model.graph.node if softmax.input[0] in n.output]
    assert masked.op_type == op_type
    place = 1 if op_type == "Where" else 0
    values = {
        "step": np.float32(0.07), "middle": np.uint8(100), "added": np.float32([[[[added]]]]),
    }  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items())
    names = [masked.input[place], "sums", "levels", "rounded"]
    kinds = {"Add": ["added"], "QuantizeLinear": ["step", "middle"]}
    kinds["DequantizeLinear"] = kinds["QuantizeLinear"]
    at = list(model.graph.node).index(masked)
    for i, (kind, extra) in reversed(list(enumerate(kinds.items()))):
        node = helper.make_node(kind, [names[i], *extra], [names[i + 1]], name=f"own{i}")
        model.graph.node.insert(at, node)
    masked.input[place] = "rounded"
    return model


def test_a_bias_that_is_rounded_with_the_scores_is_as_large_as_in_the_file(tmp_path):
    """Without the rounding, what all keys of a row have in common would not matter."""
    model = check(save(rounded_before(ALIBI, "Add"), tmp_path))
    (attention,) = calls_of(model, "slm.attention")
    assert attention.attrs["bias_by"] == "key"
    assert not attention.attrs["roundings"]
    slopes = np.array([[0.5], [0.25], [0.125]])
    assert np.allclose(model.params["attention.bias"], slopes * np.arange(32), rtol=1e-6)
    (plain,) = calls_of(import_onnx(save(build(ALIBI), tmp_path), context=32), "slm.attention")
    assert plain.attrs["bias_by"] == "distance"


def test_a_bias_that_is_nothing_in_short_sequences_is_rounded_with_scores(tmp_path):
    model = check(save(rounded_before(replace(ALIBI, mask="in_steps"), "Add"), tmp_path))
    (attention,) = calls_of(model, "slm.attention")
    assert len(parse_roundings(str(attention.attrs["sum_roundings"]))) == 1
    assert not model.params["attention.bias"][:, :8].any()


def test_what_is_the_same_for_all_scores_is_a_bias_where_they_are_rounded(tmp_path):
    tiny = replace(ALIBI, mask="trilu", learned_positions=64)
    model = check(save(rounded_before(tiny, "Add", added=0.4), tmp_path))
    assert np.allclose(model.params["attention.bias"], 0.4)


def test_a_mask_by_distance_after_scores_were_rounded_with_a_bias_is_refused(tmp_path):
    tiny = replace(ENCODER, heads=3, kv_heads=3, mask="both_ways")
    check(save(rounded_before(tiny, "Where"), tmp_path))
    with pytest.raises(
        UnsupportedOpError, match=r"rounded after a cap or a bias.*hides by distance"
    ):
        import_onnx(save(rounded_before(tiny, "Where", added=0.4), tmp_path), context=32)


def test_scores_may_be_rounded_with_a_bias_by_distance(tmp_path):
    tiny = replace(ENCODER, heads=3, kv_heads=3, mask="by_bucket")
    path = quantized(tiny, tmp_path, activation_type=U8)
    (attention,) = calls_of(check(path), "slm.attention")
    assert attention.attrs["bias_by"] == "distance"
    assert len(parse_roundings(str(attention.attrs["sum_roundings"]))) == 1


def test_a_rounded_bias_of_a_long_context_is_no_weight(tmp_path):
    """It has more elements than constants that are expanded otherwise."""
    tiny = replace(ENCODER, heads=3, kv_heads=3, mask="by_bucket", learned_positions=0)
    path = quantized(tiny, tmp_path, activation_type=U8)
    model = import_onnx(path, context=330)
    assert model.params["attention.bias"].shape == (3, 2 * 330 - 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_mask_that_was_rounded_with_its_infinities_is_refused(tmp_path):
    tiny = replace(DECODER, mask="where", rope="", learned_positions=64)
    path = quantized(tiny, tmp_path, activation_type=U8)
    with pytest.raises(UnsupportedOpError, match="exclude"):
        import_onnx(path, context=32)


def test_rounding_twice_alike_is_rounding_once(tmp_path):
    """As quantizers write it around a reshape, whose integers are moved."""
    model = build(DECODER)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.02), "scale"))
    model.graph.initializer.append(numpy_helper.from_array(np.uint8(120), "zero"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, -1]), "same"))
    head = model.graph.node[-1]
    x = head.input[0]
    names = [x, "q1", "moved", "d1", "q2", "d2"]
    kinds = ["QuantizeLinear", "Reshape", *["DequantizeLinear", "QuantizeLinear"] * 2][:5]
    for i, (kind, before, after) in enumerate(zip(kinds, names, names[1:], strict=False)):
        extra = ["same"] if kind == "Reshape" else ["scale", "zero"]
        model.graph.node.insert(
            len(model.graph.node) - 1,
            helper.make_node(kind, [before, *extra], [after], name=f"r{i}"),
        )
    model.graph.node[-1].input[0] = "d2"
    imported = check(save(model, tmp_path))
    assert op_names(imported).count("slm.quantize_dequantize") == 1


@pytest.mark.parametrize(
    ("scale", "message"),
    [(np.float32([0.1, 0.2]), "several scales"), (np.float32(-0.1), "positive number")],
    ids=["two", "negative"],
)
def test_scales_that_no_kernel_takes_are_refused_by_node(scale, message, tmp_path):
    model = build(replace(DECODER, hidden=2, heads=1, kv_heads=1, head_dim=2))
    model.graph.initializer.append(numpy_helper.from_array(scale, "scale"))
    zeros = numpy_helper.from_array(np.zeros(scale.shape, np.uint8), "zero")
    model.graph.initializer.append(zeros)
    x = model.graph.node[-1].input[0]
    place = len(model.graph.node) - 1
    for kind, before, after in (("Dequantize", "q", "d"), ("Quantize", x, "q")):
        inputs = [before, "scale", "zero"]
        node = helper.make_node(f"{kind}Linear", inputs, [after], axis=2, name=f"{kind}1")
        model.graph.node.insert(place, node)
    model.graph.node[-1].input[0] = "d"
    with pytest.raises(UnsupportedOpError, match=message):
        import_onnx(save(model, tmp_path), context=32)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2])
def test_activations_in_float8_are_refused_by_name(kind, tmp_path):
    model = build(DECODER)
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = 19
    head = model.graph.node[-1]
    for name, data, values in (("scale", TensorProto.FLOAT, [0.01]), ("zero", kind, [0.0])):
        model.graph.initializer.append(helper.make_tensor(name, data, [], values))
    x = head.input[0]
    model.graph.node.extend([
        helper.make_node("QuantizeLinear", [x, "scale", "zero"], ["levels"], name="round"),
        helper.make_node("DequantizeLinear", ["levels", "scale", "zero"], ["rounded"]),
    ])  # fmt: skip
    head.input[0] = "rounded"
    with pytest.raises(UnsupportedOpError) as caught:
        import_onnx(save(model, tmp_path), context=32)
    name = {TensorProto.FLOAT8E4M3FN: "float8_e4m3fn", TensorProto.FLOAT8E5M2: "float8_e5m2"}[kind]
    assert f"QuantizeLinear node 'round': activations are rounded to {name}" in str(caught.value)
