"""Weights that a DequantizeLinear or a Cast restores, against onnxruntime on the same model."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmtvm.ir import ops
from tests.importer.graph_builder import save
from tests.importer.graphs import build
from tests.importer.quantized import TINY, check, nibbles
from tests.importer.test_import_spellings import calls_of


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
        ((2, 53), {"axis": 0, "block_size": 24}, "int4", 24),
        ((4, 53), {"axis": 0, "block_size": 12}, "int4", 12),
        ((2, 53), {"axis": 0, "block_size": 20}, "int4", 20),
        ((8, 53), {"axis": 0, "block_size": 5}, "int4", 5),
        ((20, 53), {"axis": 0, "block_size": 2}, "f32", 0),  # as many bytes with scales
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
        ((7, 53), {"axis": 0, "block_size": 6}, "int16"),
        ((40,), {"axis": 0}, "int16"),
        ((40, 4), {"axis": 1, "block_size": 16}, "int16"),
        ((40, 11), {"axis": 1, "block_size": 5}, "f32"),
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
@pytest.mark.parametrize(
    ("scales", "attributes"),
    [
        ((), {}),
        ((53,), {"axis": 1}),
        ((3, 53), {"axis": 0, "block_size": 16}),
        ((4, 53), {"axis": 0, "block_size": 12}),
        ((40, 4), {"axis": 1, "block_size": 16}),
        ((40,), {"axis": 0}),
    ],
    ids=str,
)
def test_float8_weights_keep_their_bits(kind, scales, attributes, tmp_path):
    rng = np.random.default_rng(0)
    stored = helper.make_tensor("", kind, (40, 53), rng.normal(size=40 * 53).tolist())
    zeros = helper.make_tensor("", kind, scales, [0.0] * int(np.prod(scales)))
    values = np.asarray(rng.random(scales) / 6 + 0.01, np.float32)
    model = check(save(dequantized_head(stored, values, zeros, **attributes), tmp_path))
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


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("kind", ["INT4", "UINT8", "INT16", "FLOAT8E4M3FN"])
@pytest.mark.parametrize(
    ("scales", "attributes", "layout"),
    [
        ((), {}, (0, 0)),
        ((53,), {"axis": 0}, (0, 0)),
        ((53, 3), {"axis": 1, "block_size": 16}, (16, 0)),
        ((53, 8), {"axis": 1, "block_size": 5}, (5, 0)),
        ((40,), {"axis": 1}, (0, 64)),
        ((4, 40), {"axis": 0, "block_size": 16}, (0, 16)),
        ((9, 40), {"axis": 0, "block_size": 6}, (0, 6)),
    ],
    ids=str,
)
def test_token_tables_keep_their_bits(scales, attributes, layout, kind, tied, tmp_path):
    rng = np.random.default_rng(0)
    model = build(replace(TINY, tied=tied))
    model.opset_import[0].version = 21
    model.ir_version = 10
    stored, zeros = numbers(rng, kind, (53, 40)), numbers(rng, kind, scales, spread=3)
    stored.name, zeros.name = "table.q", "table.z"
    # Of numbers of 16 bits the values are as large as of 8.
    size = {"INT4": 1 / 4, "FLOAT8E4M3FN": 1.0}.get(kind, 1 / 60)
    values = np.asarray((rng.random(scales) + 0.1) * size, np.float32)
    model.graph.initializer.extend([stored, zeros, numpy_helper.from_array(values, "table.s")])
    for node in model.graph.node:
        node.input[:] = ["table.w" if i == "embedding.weight" else i for i in node.input]
    inputs = ["table.q", "table.s", "table.z"]
    model.graph.node.insert(
        0, helper.make_node("DequantizeLinear", inputs, ["table.w"], **attributes)
    )
    imported = check(save(model, tmp_path))
    table = calls_of(imported, "slm.embedding")[0].attrs
    assert (int(table["group_size"]), int(table["group_channels"])) == layout
    assert str(table["format"]) == {"UINT8": "int8", "FLOAT8E4M3FN": "e4m3fn"}.get(
        kind, kind.lower()
    )
    assert any("expanded" in note for note in imported.notes) == (tied and layout == (0, 6))


def numbers(
    rng: np.random.Generator, kind: str, shape: tuple[int, ...], spread: int = 100
) -> onnx.TensorProto:
    """Random numbers of an element type, and as zero points (of a small ``spread``) what floats
    have."""
    if kind == "INT4":
        return nibbles(rng, shape, True)
    count = int(np.prod(shape))
    if kind == "FLOAT8E4M3FN":
        values = rng.normal(size=count) if spread > 10 else np.zeros(count)
        return helper.make_tensor("", TensorProto.FLOAT8E4M3FN, shape, values.tolist())
    middle = 128 if kind == "UINT8" else 0
    values = rng.integers(middle - spread, middle + spread, count)
    return helper.make_tensor("", getattr(TensorProto, kind), shape, values.tolist())
