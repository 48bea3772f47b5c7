"""Quantized weights in every layout, against onnxruntime on the same small model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir import ops
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build
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
    size = {"tensor": (), "channel": (53,), "blocks": (3, 53)}[axis]
    scales = rng.random(size).astype(np.float32) / 50
    zeros = rng.integers(-3, 4, size, dtype=np.int8)
    for name, array in (("q", q), ("scales", scales), ("zeros", zeros)):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), f"head.{name}"))
    attributes = {"axis": 0, "block_size": 16} if axis == "blocks" else {"axis": 1}
    node = helper.make_node(
        "DequantizeLinear", ["head.q", "head.scales", "head.zeros"], ["head.w"], **attributes
    )
    model.graph.node.insert(0, node)
    model.graph.node[-1].input[1] = "head.w"
    imported = check(save(model, tmp_path))
    head = calls_of(imported, "slm.linear")[-1]
    assert str(head.attrs["format"]) == "int8"
    assert int(head.attrs["group_size"]) == (16 if axis == "blocks" else 0)


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
    model = matmul_nbits(
        build(TINY), bits=4, block_size=16, is_symmetric=True,
        accuracy_level=changes.pop("accuracy_level", None),
    )  # fmt: skip
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
        ({"g_idx": np.full(40, 3, np.int32)}, InvalidModelError, "g_idx 'g_idx' names group 3"),
        ({"g_idx": np.zeros(39, np.int32)}, InvalidModelError, "must hold 40 group numbers"),
        ({"bits": 3}, UnsupportedOpError, "3 bits"),
        ({"bits": 2}, InvalidModelError, "need 636 bytes"),
        ({"block_size": 8}, UnsupportedOpError, "blocks of 8"),
        ({"zeros": np.zeros((53, 3), np.int8)}, UnsupportedOpError, "type int8"),
        ({"zeros": np.zeros((53, 2), np.float32)}, InvalidModelError, "106 float zero points"),
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


def two_bits(model: onnx.ModelProto, zero_points: bool) -> onnx.ModelProto:
    """``model`` with its head as MatMulNBits of 2 bits."""
    rng = np.random.default_rng(0)
    arrays = {
        "head.q": rng.integers(0, 256, (53, 3, 4), dtype=np.uint8),
        "head.scales": rng.random((53, 3)).astype(np.float32) / 9,
    }
    if zero_points:
        arrays["head.zeros"] = rng.integers(0, 64, 53, dtype=np.uint8)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in arrays.items())
    x = model.graph.node[-1].input[0]
    node = helper.make_node(
        "MatMulNBits", [x, *arrays], ["logits"], domain="com.microsoft",
        K=40, N=53, bits=2, block_size=16,
    )  # fmt: skip
    model.graph.node[-1].CopyFrom(node)
    return model


@pytest.mark.parametrize("zero_points", [True, False])
def test_two_bits_stay_packed(zero_points, tmp_path):
    model = check(save(two_bits(build(TINY), zero_points), tmp_path))
    head = calls_of(model, "slm.linear")[-1]
    assert str(head.attrs["format"]) == "int2"
    assert tuple(head.args[1].ty.shape) == (53, 10)
    assert ("zero_points" in str(head.attrs["operands"])) == zero_points
    assert not model.notes


def test_zero_points_may_be_floats(tmp_path):
    zeros = np.random.default_rng(0).uniform(0, 15, (53, 3)).astype(np.float32)
    model = check(save(nbits_head(zeros=zeros, accuracy_level=4), tmp_path))
    head = calls_of(model, "slm.linear")[-1]
    assert model.params[ops.operands(head)["zero_points"].name].dtype == np.float32
    assert str(head.attrs["activation"]) == "f32"  # as onnxruntime computes it


@pytest.mark.parametrize("zeros", [None, "float"])
@pytest.mark.parametrize(
    ("groups", "columns"),
    [
        (np.arange(40) // 16, 40),
        (np.random.default_rng(0).permutation(40) // 16, 48),
        ((np.random.default_rng(0).permutation(40) // 16 + 1) % 3, 48),  # the first is short
        (np.repeat([2, 0, 1], [1, 15, 24]), 64),
        (np.repeat([0, 2], [3, 37]), 64),  # none of group 1
    ],
    ids=["in order", "permuted", "short group first", "of any size", "empty group"],
)
def test_columns_in_the_order_of_activations_are_grouped_again(groups, columns, zeros, tmp_path):
    more = {} if zeros is None else {
        "zeros": np.random.default_rng(0).uniform(0, 15, (53, 3)).astype(np.float32)
    }  # fmt: skip
    model = check(save(nbits_head(g_idx=groups.astype(np.int32), **more), tmp_path))
    head = calls_of(model, "slm.linear")[-1]
    assert (str(head.attrs["format"]), int(head.attrs["k"])) == ("int4", columns)
    assert int(head.attrs["group_size"]) == 16


def test_packed_zero_points_of_groups_of_any_size_mean_what_floats_do(tmp_path):
    # onnxruntime ignores packed ones where there is a g_idx, and floats it does not.
    rng = np.random.default_rng(0)
    zeros = rng.integers(0, 16, (53, 3), dtype=np.uint8)
    packed = np.stack([zeros[:, 0] | zeros[:, 1] << 4, zeros[:, 2]], axis=1).reshape(-1)
    groups = {"g_idx": rng.integers(0, 3, 40).astype(np.int32)}
    want = check(save(nbits_head(zeros=zeros.astype(np.float32), **groups), tmp_path))
    model = import_onnx(save(nbits_head(zeros=packed, **groups), tmp_path), context=32)
    got, expected = evaluate(model, TOKENS), evaluate(want, TOKENS)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * np.ptp(expected))


def dequantized_head(
    stored: onnx.TensorProto, scales: np.ndarray, zeros: onnx.TensorProto | None, **attributes
) -> onnx.ModelProto:
    """The model with its head (40, 53) as a DequantizeLinear of ``stored``."""
    model = build(TINY)
    model.opset_import[0].version = 21
    model.ir_version = 10
    model.graph.initializer.append(numpy_helper.from_array(scales, "head.scales"))
    for tensor, name in ((stored, "head.q"), (zeros, "head.zeros")):
        if tensor is not None:
            tensor.name = name
            model.graph.initializer.append(tensor)
    inputs = ["head.q", "head.scales", *(["head.zeros"] if zeros is not None else [])]
    model.graph.node.insert(
        0, helper.make_node("DequantizeLinear", inputs, ["head.w"], **attributes)
    )
    model.graph.node[-1].input[1] = "head.w"
    return model


def nibbles(rng: np.random.Generator, shape: tuple[int, ...], signed: bool) -> onnx.TensorProto:
    kind = TensorProto.INT4 if signed else TensorProto.UINT4
    raw = rng.integers(0, 256, -(-math.prod(shape) // 2), dtype=np.uint8).tobytes()
    return helper.make_tensor("", kind, shape, raw, raw=True)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("scales", "attributes", "format", "group"),
    [
        ((), {}, "int4", 64),
        ((53,), {"axis": 1}, "int4", 64),
        ((40,), {"axis": 0}, "int4", 0),
        ((3, 53), {"axis": 0, "block_size": 16}, "int4", 16),
        ((2, 53), {"axis": -2, "block_size": 32}, "int4", 32),
        ((1, 53), {"axis": 0, "block_size": 512}, "int4", 64),
        ((5, 53), {"axis": 0, "block_size": 8}, "int4", 8),
        ((2, 53), {"axis": 0, "block_size": 24}, "int4", 8),
        ((4, 53), {"axis": 0, "block_size": 12}, "f32", 0),
        ((40, 4), {"axis": 1, "block_size": 16}, "int4", 0),
        ((40, 3), {"axis": 1, "block_size": 24}, "int4", 0),
        ((40, 5), {"axis": 1, "block_size": 12}, "int4", 0),
        ((40, 6), {"axis": 1, "block_size": 10}, "f32", 0),
    ],
    ids=str,
)
def test_nibbles_stay_packed_wherever_scales_follow_the_outputs(
    scales, attributes, format, group, signed, tmp_path
):
    rng = np.random.default_rng(0)
    zeros = nibbles(rng, scales, signed)
    values = np.asarray(rng.random(scales) / 8, np.float32)
    path = save(
        dequantized_head(nibbles(rng, (40, 53), signed), values, zeros, **attributes), tmp_path
    )
    model = check(path)
    head = calls_of(model, "slm.linear")[-1]
    assert (str(head.attrs["format"]), int(head.attrs["group_size"])) == (format, group)
    assert bool(model.notes) == (format == "f32")


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "block", "layers"),
    [
        (2, 12, 16, {(48, 16), (24, 16), (24, 8)}),
        (2, 12, 24, {(48, 8), (24, 8)}),
        (2, 12, 20, {(48, 4), (24, 4)}),
        (2, 12, 10, set()),  # blocks of 2 have no kernel
        (1, 12, 16, {(48, 16), (12, 16), (12, 4)}),
        (1, 10, 16, {(40, 16), (10, 8), (10, 16)}),
        (1, 10, 4, {(60, 4)}),  # values begin within a block and go beyond it
    ],
)
def test_a_packed_product_in_blocks_of_outputs_is_divided_where_no_block_is_cut(
    kv_heads, head_dim, block, layers, signed, tmp_path
):
    model = build(replace(TINY, kv_heads=kv_heads, head_dim=head_dim))
    model.opset_import[0].version = 21
    model.ir_version = 10
    rng = np.random.default_rng(0)
    # Queries, keys and values of the first layer become one product.
    widths = {t.name: t.dims[1] for t in model.graph.initializer if len(t.dims) == 2}
    products = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in widths]
    readers = products[:3]
    sizes = np.array([widths[n.input[1]] for n in readers])
    assert sizes.tolist() == [head_dim * heads for heads in (4, kv_heads, kv_heads)]
    blocks = -(-sizes.sum() // block)
    stored, zeros = nibbles(rng, (40, sizes.sum()), signed), nibbles(rng, (40, blocks), signed)
    stored.name, zeros.name = "qkv.q", "qkv.z"
    scales = np.asarray(rng.random((40, blocks)) / 40, np.float32)
    model.graph.initializer.extend(
        [stored, zeros, numpy_helper.from_array(scales, "qkv.s"),
         numpy_helper.from_array(sizes, "qkv.sizes")]
    )  # fmt: skip
    at = list(model.graph.node).index(readers[0])
    nodes = [
        helper.make_node("DequantizeLinear", ["qkv.q", "qkv.s", "qkv.z"], ["qkv.w"], axis=1,
                         block_size=block),
        helper.make_node("MatMul", [readers[0].input[0], "qkv.w"], ["qkv"]),
        helper.make_node("Split", ["qkv", "qkv.sizes"], [n.output[0] for n in readers], axis=-1),
    ]  # fmt: skip
    for node in readers:
        model.graph.node.remove(node)
    for node in reversed(nodes):
        model.graph.node.insert(at, node)
    imported = check(save(model, tmp_path))
    found = [c for c in calls_of(imported, "slm.linear") if str(c.attrs["format"]) == "int4"]
    assert {(int(c.attrs["n"]), int(c.attrs["group_channels"])) for c in found} == layers


@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
@pytest.mark.parametrize(
    ("size", "attributes", "format"),
    [
        ((), {}, "int16"),
        ((53,), {"axis": 1}, "int16"),
        ((3, 53), {"axis": 0, "block_size": 16}, "int16"),
        ((40, 4), {"axis": 1, "block_size": 16}, "f32"),
    ],
    ids=str,
)
def test_weights_of_sixteen_bits_keep_them(size, attributes, format, dtype, tmp_path):
    rng = np.random.default_rng(0)
    q = rng.integers(0, 30000, (40, 53)).astype(dtype)
    scales = np.asarray(rng.random(size) / 15000, np.float32)
    zeros = numpy_helper.from_array(np.full(size, 15000, dtype))
    stored = numpy_helper.from_array(q)
    model = check(save(dequantized_head(stored, scales, zeros, **attributes), tmp_path))
    assert str(calls_of(model, "slm.linear")[-1].attrs["format"]) == format
    assert any("expanded to float32, 2 times" in n for n in model.notes) == (format == "f32")


@pytest.mark.parametrize(
    "kind", [TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E4M3FNUZ]
)
@pytest.mark.parametrize("scales", [(), (53,)], ids=["tensor", "channel"])
def test_float8_weights_keep_their_bits(kind, scales, tmp_path):
    rng = np.random.default_rng(0)
    stored = helper.make_tensor("", kind, (40, 53), rng.normal(size=40 * 53).tolist())
    zeros = helper.make_tensor("", kind, scales, [0.0] * int(np.prod(scales)))
    values = np.asarray(rng.random(scales) / 6 + 0.01, np.float32)
    model = check(save(dequantized_head(stored, values, zeros, axis=1), tmp_path))
    head = calls_of(model, "slm.linear")[-1]
    name = ops.operands(head)["weight"].name
    assert str(head.attrs["format"]).startswith("e")
    assert model.params[name].dtype == np.uint8
    assert not model.notes


def test_bfloat16_weights_behind_a_cast_keep_their_bits(tmp_path):
    model = build(TINY)
    for name in ("embedding.weight", "head.weight"):
        tensor = next(t for t in model.graph.initializer if t.name == name)
        narrow = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
        tensor.CopyFrom(numpy_helper.from_array(narrow, name))
        cast = helper.make_node("Cast", [name], [f"{name}.wide"], to=TensorProto.FLOAT)
        for node in model.graph.node:
            node.input[:] = [f"{name}.wide" if i == name else i for i in node.input]
        model.graph.node.insert(0, cast)
    imported = check(save(model, tmp_path))
    assert str(calls_of(imported, "slm.embedding")[0].attrs["format"]) == "bf16"
    assert str(calls_of(imported, "slm.linear")[-1].attrs["format"]) == "bf16"


@pytest.mark.parametrize("through", ["Transpose", "Gemm"])
def test_nibbles_are_transposed_packed(through, tmp_path):
    rng = np.random.default_rng(0)
    scales = rng.random((53, 3)).astype(np.float32) / 8
    model = dequantized_head(nibbles(rng, (53, 40), True), scales, None, axis=1, block_size=16)
    head = model.graph.node[-1]
    if through == "Transpose":
        node = helper.make_node("Transpose", ["head.w"], ["head.t"], perm=[1, 0])
        model.graph.node.insert(1, node)
        model.graph.node[-1].input[1] = "head.t"
    else:
        x = head.input[0]
        model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 40]), "flat"))
        model.graph.initializer.append(numpy_helper.from_array(np.array([1, -1, 53]), "deep"))
        nodes = [
            helper.make_node("Reshape", [x, "flat"], ["x.flat"]),
            helper.make_node("Gemm", ["x.flat", "head.w"], ["y.flat"], transB=1),
            helper.make_node("Reshape", ["y.flat", "deep"], ["logits"]),
        ]
        del model.graph.node[-1]
        model.graph.node.extend(nodes)
    imported = check(save(model, tmp_path))
    call = calls_of(imported, "slm.linear")[-1]
    assert (str(call.attrs["format"]), int(call.attrs["group_size"])) == ("int4", 16)


def test_a_table_of_nibbles_may_have_rows_of_odd_width(tmp_path):
    tiny = replace(TINY, hidden=41)
    model = build(tiny)
    model.opset_import[0].version = 21
    rng = np.random.default_rng(0)
    table = nibbles(rng, (53, 41), True)
    table.name = "table.q"
    model.graph.initializer.append(table)
    scales = rng.random((53, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(scales, "table.scales"))
    lookup = next(n for n in model.graph.node if n.op_type == "Gather")
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": 16}
    node = helper.make_node(
        "GatherBlockQuantized", ["table.q", "input_ids", "table.scales"], [lookup.output[0]],
        domain="com.microsoft", **attributes,
    )  # fmt: skip
    lookup.CopyFrom(node)
    imported = check(save(model, tmp_path))
    assert tuple(calls_of(imported, "slm.embedding")[0].args[1].ty.shape) == (53, 21)
