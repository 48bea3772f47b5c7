"""Quantized weights in every layout, against onnxruntime on the same small model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from tests.importer.graphs import Tiny, build, run_onnxruntime, save
from tests.importer.test_import_spellings import calls_of

# No size is a multiple of a block, and the head's rows are odd in number.
TINY = Tiny(hidden=40, heads=4, kv_heads=2, head_dim=12, ffn=72, vocab=53, rope="rotate_half")
TOKENS = np.array([3, 50, 7, 7, 21, 0, 52, 11, 30, 4, 4, 19])
TOLERANCE = 2e-4


def matmul_nbits(model: onnx.ModelProto, **options) -> onnx.ModelProto:
    quantizer = MatMulNBitsQuantizer(model, **options)
    quantizer.process()
    return quantizer.model.model


def check(path: Path, tokens: np.ndarray = TOKENS) -> CanonicalModel:
    model = import_onnx(path, context=32)
    want = run_onnxruntime(path, tokens)
    got = evaluate(model, tokens)
    assert np.abs(got - want).max() <= TOLERANCE * np.ptp(want)
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_weights_stay_packed(bits, block, symmetric, tmp_path):
    quantized = matmul_nbits(build(TINY), bits=bits, block_size=block, is_symmetric=symmetric)
    model = check(save(quantized, tmp_path))
    for call in calls_of(model, "slm.linear"):
        k, n = int(call.attrs["k"]), int(call.attrs["n"])
        assert call.attrs["format"] == f"int{bits}"
        assert int(call.attrs["group_size"]) == block
        assert tuple(call.args[1].ty.shape) == (n, (k * bits + 7) // 8)
        assert tuple(call.args[2].ty.shape) == (n, -(-k // block))
        assert ("zero_points" in str(call.attrs["operands"])) != symmetric


@pytest.mark.parametrize(("level", "activation"), [(4, "block"), (1, "f32"), (None, "f32")])
def test_the_accuracy_level_says_what_is_asked_of_activations(level, activation, tmp_path):
    quantized = matmul_nbits(build(TINY), bits=4, block_size=32, accuracy_level=level)
    model = import_onnx(save(quantized, tmp_path), context=32)
    assert {str(c.attrs["activation"]) for c in calls_of(model, "slm.linear")} == {activation}


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_table_of_four_bits_stays_packed(symmetric, tmp_path):
    quantized = matmul_nbits(
        build(TINY), block_size=16, is_symmetric=symmetric, op_types_to_quantize=("Gather",)
    )
    model = check(save(quantized, tmp_path))
    (call,) = calls_of(model, "slm.embedding")
    assert (str(call.attrs["format"]), int(call.attrs["group_size"])) == ("int4", 16)
    assert tuple(call.args[1].ty.shape) == (53, 20)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("with_zero_points", [True, False])
def test_a_table_of_bytes_stays_packed(bits, with_zero_points, tmp_path):
    """GatherBlockQuantized with uint8 data, as onnxruntime-genai writes it."""
    rng = np.random.default_rng(0)
    model = build(TINY)
    packed = rng.integers(0, 256, (53, 40 * bits // 8), dtype=np.uint8)
    scales = rng.random((53, 3), np.float32)
    zeros = rng.integers(0, 256, (53, -(-3 * bits // 8)), dtype=np.uint8)
    named = {"table.q": packed, "table.scales": scales}
    if with_zero_points:
        named["table.zeros"] = zeros
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in named.items())
    lookup = next(n for n in model.graph.node if n.op_type == "Gather")
    quantized = helper.make_node(
        "GatherBlockQuantized",
        ["table.q", "input_ids", *list(named)[1:]],
        [lookup.output[0]],
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=1,
        block_size=16,
        bits=bits,
    )
    lookup.CopyFrom(quantized)
    imported = check(save(model, tmp_path))
    (call,) = calls_of(imported, "slm.embedding")
    assert str(call.attrs["format"]) == f"int{bits}"


@pytest.mark.parametrize("weight_type", [QuantType.QInt8, QuantType.QUInt8])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_dynamic_int8_is_one_layer_with_its_bias(weight_type, per_channel, bias, tmp_path):
    tiny = Tiny(**{**TINY.__dict__, "bias": bias})
    source = save(build(tiny), tmp_path, "float.onnx")
    target = tmp_path / "int8.onnx"
    quantize_dynamic(source, target, weight_type=weight_type, per_channel=per_channel)
    # One token: onnxruntime's range of the tensor is that of the row.
    model = check(target, TOKENS[:1])
    linears = calls_of(model, "slm.linear")
    assert len(linears) == 8
    assert {str(c.attrs["format"]) for c in linears} == {"int8"}
    assert {str(c.attrs["activation"]) for c in linears} == {"row_u8"}
    with_bias = sum("bias" in str(c.attrs["operands"]) for c in linears)
    assert with_bias == (7 if bias else 0)
    rows = {tuple(c.args[2].ty.shape) for c in linears}
    assert rows == ({(int(c.attrs["n"]),) for c in linears} if per_channel else {(1,)})


@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize("axis", ["tensor", "channel", "blocks"])
def test_dequantized_weights_stay_in_eight_bits(axis, opset, tmp_path):
    if axis == "blocks" and opset < 21:
        pytest.skip("blocks came with opset 21")
    model = build(TINY)
    model.opset_import[0].version = opset
    rng = np.random.default_rng(0)
    q = rng.integers(-120, 120, (40, 53), dtype=np.int8)
    size = {"tensor": (), "channel": (53,), "blocks": (5, 53)}[axis]
    scales = rng.random(size).astype(np.float32) / 50
    zeros = rng.integers(-3, 4, size, dtype=np.int8)
    for name, array in (("q", q), ("scales", scales), ("zeros", zeros)):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), f"head.{name}"))
    attributes = {"axis": 0, "block_size": 8} if axis == "blocks" else {"axis": 1}
    node = helper.make_node(
        "DequantizeLinear", ["head.q", "head.scales", "head.zeros"], ["head.w"], **attributes
    )
    model.graph.node.insert(0, node)
    model.graph.node[-1].input[1] = "head.w"
    imported = check(save(model, tmp_path))
    head = calls_of(imported, "slm.linear")[-1]
    assert str(head.attrs["format"]) == "int8"
    assert int(head.attrs["group_size"]) == (8 if axis == "blocks" else 0)


@pytest.mark.parametrize("signed", [True, False])
def test_dequantized_blocks_of_four_bits_stay_packed(signed, tmp_path):
    model = build(TINY)
    model.opset_import[0].version = 21
    rng = np.random.default_rng(0)
    kind = TensorProto.INT4 if signed else TensorProto.UINT4
    raw = rng.integers(0, 256, 40 * 53 // 2, dtype=np.uint8).tobytes()
    zeros = rng.integers(0, 256, -(-3 * 53 // 2), dtype=np.uint8).tobytes()
    scales = rng.random((3, 53)).astype(np.float32) / 8
    model.graph.initializer.append(helper.make_tensor("head.q", kind, (40, 53), raw, raw=True))
    model.graph.initializer.append(helper.make_tensor("head.z", kind, (3, 53), zeros, raw=True))
    model.graph.initializer.append(numpy_helper.from_array(scales, "head.scales"))
    inputs = ["head.q", "head.scales", "head.z"]
    node = helper.make_node("DequantizeLinear", inputs, ["head.w"], axis=0, block_size=16)
    model.graph.node.insert(0, node)
    model.graph.node[-1].input[1] = "head.w"
    imported = check(save(model, tmp_path))
    head = calls_of(imported, "slm.linear")[-1]
    assert (str(head.attrs["format"]), int(head.attrs["group_size"])) == ("int4", 16)
    assert tuple(head.args[1].ty.shape) == (53, 20)


def test_half_precision_weights_behind_a_cast_stay_halves(tmp_path):
    model = build(TINY)
    for name in ("embedding.weight", "head.weight"):
        tensor = next(t for t in model.graph.initializer if t.name == name)
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, name))
        cast = helper.make_node("Cast", [name], [f"{name}.wide"], to=TensorProto.FLOAT)
        for node in model.graph.node:
            node.input[:] = [f"{name}.wide" if i == name else i for i in node.input]
        model.graph.node.insert(0, cast)
    imported = check(save(model, tmp_path))
    assert str(calls_of(imported, "slm.embedding")[0].attrs["format"]) == "f16"
    assert str(calls_of(imported, "slm.linear")[-1].attrs["format"]) == "f16"
    assert imported.params["head.weight"].dtype == np.float16


def nbits_head(**changes) -> onnx.ModelProto:
    """The model with its head as MatMulNBits, some inputs or attributes changed."""
    model = matmul_nbits(build(TINY), bits=4, block_size=16, is_symmetric=True)
    head = model.graph.node[-1]
    for attribute in head.attribute:
        if attribute.name in changes:
            attribute.i = changes.pop(attribute.name)
    for name, array in changes.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        place = {"zeros": 3, "g_idx": 4, "bias": 5}[name]
        head.input.extend([""] * (place + 1 - len(head.input)))
        head.input[place] = name
    return model


def test_the_bias_of_a_quantized_product_belongs_to_the_layer(tmp_path):
    bias = np.linspace(-1, 1, 53, dtype=np.float32)
    model = check(save(nbits_head(bias=bias), tmp_path))
    assert "bias" in str(calls_of(model, "slm.linear")[-1].attrs["operands"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"g_idx": np.zeros(40, np.int32)}, UnsupportedOpError, "g_idx"),
        ({"bits": 2}, UnsupportedOpError, "2 bits"),
        ({"block_size": 8}, UnsupportedOpError, "blocks of 8"),
        ({"zeros": np.zeros((53, 3), np.float32)}, UnsupportedOpError, "float32"),
        ({"zeros": np.zeros(5, np.uint8)}, InvalidModelError, "5 bytes of zero points"),
        ({"N": 54}, InvalidModelError, "[1, 7, 54]"),
        ({"bias": np.zeros(7, np.float32)}, InvalidModelError, "'bias' has shape [7]"),
    ],
    ids=lambda x: str(sorted(x)) if isinstance(x, dict) else "",
)
def test_a_quantized_product_that_does_not_fit_names_the_node(changes, error, message, tmp_path):
    path = save(nbits_head(**changes), tmp_path)
    with pytest.raises(error) as caught:
        import_onnx(path, context=32)
    assert message in str(caught.value)
    assert "com.microsoft.MatMulNBits node" in str(caught.value) or "'logits'" in str(caught.value)
