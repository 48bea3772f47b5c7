"""Quantized weights of products and tables, against onnxruntime on the same small model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir import ops
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import save
from tests.importer.graphs import Tiny, build
from tests.importer.quantized import TINY, TOKENS, check, matmul_nbits, nibbles
from tests.importer.test_import_spellings import calls_of


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


@pytest.mark.parametrize("bits", [2, 4, 8])
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


def test_two_bits_with_the_order_of_activations_mean_what_they_do_without(tmp_path):
    want = import_onnx(save(two_bits(build(TINY), True), tmp_path), context=32)
    model = two_bits(build(TINY), True)
    order = numpy_helper.from_array(np.arange(40, dtype=np.int32) // 16, "order")
    model.graph.initializer.append(order)
    model.graph.node[-1].input.append("order")
    got = import_onnx(save(model, tmp_path), context=32)
    np.testing.assert_array_equal(evaluate(got, TOKENS), evaluate(want, TOKENS))
    assert any("reads the bytes as values of 4 bits" in note for note in got.notes)


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


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("with_zero_points", [True, False])
def test_rows_of_a_table_of_nibbles_may_share_scales(with_zero_points, signed, tmp_path):
    model = build(TINY)
    model.opset_import[0].version = 21
    rng = np.random.default_rng(0)
    tensors = [nibbles(rng, (53, 40), signed), nibbles(rng, (4, 40), signed)]
    for tensor, name in zip(tensors, ("table.q", "table.zeros"), strict=True):
        tensor.name = name
        model.graph.initializer.append(tensor)
    scales = rng.random((4, 40)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(scales, "table.scales"))
    lookup = next(n for n in model.graph.node if n.op_type == "Gather")
    inputs = ["table.q", "input_ids", "table.scales"] + ["table.zeros"] * with_zero_points
    node = helper.make_node(
        "GatherBlockQuantized", inputs, [lookup.output[0]], domain="com.microsoft",
        gather_axis=0, quantize_axis=0, block_size=16,
    )  # fmt: skip
    lookup.CopyFrom(node)
    (call,) = calls_of(check(save(model, tmp_path)), "slm.embedding")
    assert (str(call.attrs["format"]), int(call.attrs["group_channels"])) == ("int4", 16)
