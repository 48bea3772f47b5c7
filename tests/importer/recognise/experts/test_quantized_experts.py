"""Experts that an exporter wrote one by one, quantized afterwards by onnxruntime's quantizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import GraphBuilder, run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.quantized import matmul_nbits
from tests.importer.recognise.experts.test_experts import (
    EXPERTS,
    FFN,
    TOKENS,
    TOP_K,
    calls,
    check,
    loop_over_experts,
)
from tests.importer.recognise.linear.test_restored_weights import numbers

TINY = Tiny(block=loop_over_experts, layers=2)
BLOCK = 16
FORMS = {
    "four bits": ({"bits": 4, "is_symmetric": True}, "int4"),
    "zero points": ({"bits": 4, "is_symmetric": False}, "int4"),
    "eight bits": ({"bits": 8, "is_symmetric": False}, "int8"),
    "two bits": ({"bits": 2, "is_symmetric": False}, "int2"),
    "dequantized": ({"quant_format": QuantFormat.QDQ}, "int4"),
}


def experts_of(path: Path) -> list[dict[str, object]]:
    """The attributes of every mixture."""
    found = [dict(call.attrs) for call in calls(import_onnx(path, context=24), "slm.moe")]
    assert [(a["experts"], a["top_k"]) for a in found] == [(EXPERTS, TOP_K)] * TINY.layers
    return found


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_weights_stay_packed_in_every_expert(form: str, tmp_path: Path) -> None:
    options, weights = FORMS[form]
    path = save(matmul_nbits(build(TINY), block_size=BLOCK, **options), tmp_path)
    for attrs in experts_of(path):
        for layer in ("up", "down"):
            assert (attrs[f"{layer}_format"], attrs[f"{layer}_activation"]) == (weights, "f32")
    check(import_onnx(path, context=24), path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "format"),
    [("INT4", "int4"), ("UINT8", "int8"), ("INT16", "int16"), ("FLOAT8E4M3FN", "e4m3fn")],
)
@pytest.mark.parametrize(
    ("axis", "block", "layout"),
    [
        (0, 0, {(0, 8), (0, 4)}),  # a scale for each input
        (1, 0, {(0, 0), (32, 0), (64, 0)}),
        (0, 12, {(12, 0)}),
        (1, 16, {(0, 8), (0, 4)}),  # blocks that lie in one half of the outputs
        (1, 6, {(0, 0)}),
    ],
)
def test_dequantized_experts_keep_their_bits(
    axis: int, block: int, layout: set[tuple[int, int]], kind: str, format: str, tmp_path: Path
) -> None:
    ffn, hidden = 40, 24

    def experts(b: GraphBuilder, x: str, width: int) -> str:
        return loop_over_experts(b, x, width, ffn=ffn)

    model = build(Tiny(block=experts, hidden=hidden))
    model.opset_import[0].version = 21
    model.ir_version = 10
    rng = np.random.default_rng(0)
    tensors = {t.name: t for t in model.graph.initializer}
    for node in [n for n in model.graph.node if n.op_type == "MatMul"]:
        weight = tensors.get(node.input[1])
        if weight is None or ffn not in weight.dims:
            continue
        shape = tuple(weight.dims)
        per: tuple[int, ...] = (shape[axis],)
        if block:
            per = tuple(-(-d // block) if i == axis else d for i, d in enumerate(shape))
        size = {"INT4": 1 / 40, "FLOAT8E4M3FN": 1 / 5}.get(kind, 1 / 400)
        scales = ((rng.random(per) + 0.1) * size).astype(np.float32)
        new = [numbers(rng, kind, shape), numbers(rng, kind, per, spread=3)]
        for tensor, end in zip(new, "qz", strict=True):
            tensor.name = f"{weight.name}.{end}"
        names = [f"{weight.name}.{end}" for end in "qsz"]
        model.graph.initializer.extend([*new, numpy_helper.from_array(scales, names[1])])
        model.graph.initializer.remove(weight)
        attributes = {"axis": axis, **({"block_size": block} if block else {})}
        made = helper.make_node("DequantizeLinear", names, [weight.name], **attributes)
        model.graph.node.insert(0, made)
    path = save(model, tmp_path)
    imported = import_onnx(path, context=24)
    (attrs,) = [dict(call.attrs) for call in calls(imported, "slm.moe")]
    expanded = (axis, block) == (1, 6)
    for layer in ("up", "down"):
        assert attrs[f"{layer}_format"] == ("f32" if expanded else format)
        found = (int(attrs[f"{layer}_group_size"]), int(attrs[f"{layer}_group_channels"]))
        assert found in layout
    assert any("expanded" in note for note in imported.notes) == expanded
    check(imported, path)


def test_zero_points_of_experts_may_be_floats(tmp_path: Path) -> None:
    model = matmul_nbits(build(TINY), block_size=BLOCK, is_symmetric=False)
    tensors = {t.name: t for t in model.graph.initializer}
    for node in [n for n in model.graph.node if n.op_type == "MatMulNBits"]:
        scales, zeros = (tensors[name] for name in node.input[2:4])
        packed = numpy_helper.to_array(zeros).reshape(numpy_helper.to_array(scales).shape[0], -1)
        values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
        groups = numpy_helper.to_array(scales).size // len(packed)
        floats = values[:, :groups].astype(np.float32) + np.float32(0.25)
        zeros.CopyFrom(numpy_helper.from_array(floats, zeros.name))
    path = save(model, tmp_path)
    assert {attrs["up_format"] for attrs in experts_of(path)} == {"int4"}
    check(import_onnx(path, context=24), path)


def test_an_expert_without_zero_points_has_the_default_ones_among_others(tmp_path: Path) -> None:
    model = matmul_nbits(build(TINY), block_size=BLOCK, is_symmetric=False)
    layer = [n for n in model.graph.node if n.op_type == "MatMulNBits"][-4]
    zeros = next(t for t in model.graph.initializer if t.name == layer.input[3])
    del layer.input[3:]
    model.graph.initializer.remove(zeros)
    path = save(model, tmp_path)
    check(import_onnx(path, context=24), path)


def test_experts_take_activations_in_blocks_where_the_file_asks_for_it(tmp_path: Path) -> None:
    path = save(matmul_nbits(build(TINY), block_size=BLOCK, accuracy_level=4), tmp_path)
    for attrs in experts_of(path):
        assert attrs["up_activation"] == attrs["down_activation"] == "block"
    want = run_onnxruntime(path, TOKENS)
    assert np.abs(evaluate(import_onnx(path, context=24), TOKENS) - want).max() <= (
        1e-3 * np.ptp(want)
    )


def test_columns_of_experts_in_the_order_of_activations_are_refused(tmp_path: Path) -> None:
    model = matmul_nbits(build(TINY), block_size=BLOCK)
    layer = [n for n in model.graph.node if n.op_type == "MatMulNBits"][-4]
    k = next(a.i for a in layer.attribute if a.name == "K")
    order = numpy_helper.from_array(np.arange(k, dtype=np.int32)[::-1] // BLOCK, "order")
    model.graph.initializer.append(order)
    layer.input.append("order")
    with pytest.raises(UnsupportedOpError, match="not recognised"):
        import_onnx(save(model, tmp_path), context=24)


@pytest.mark.slow
@pytest.mark.parametrize("weight_type", [QuantType.QInt8, QuantType.QUInt8], ids=str)
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("scales", ["together", "one by one"])
def test_experts_on_integers_round_each_row(
    weight_type: QuantType, per_channel: bool, scales: str, tmp_path: Path
) -> None:
    """Compared token by token: the file gives all tokens of an expert one scale."""
    source = save(build(TINY), tmp_path, "float.onnx")
    path = tmp_path / "model.onnx"
    quantize_dynamic(source, path, weight_type=weight_type, per_channel=per_channel)
    if scales == "one by one":
        model = onnx.load(path)
        apart(model)
        onnx.save(model, path)
    for attrs in experts_of(path):
        for layer in ("up", "down"):
            assert (attrs[f"{layer}_format"], attrs[f"{layer}_activation"]) == ("int8", "row_u8")
    model = import_onnx(path, context=24)
    for token in TOKENS[:6]:
        want = run_onnxruntime(path, np.array([token]))
        assert np.abs(evaluate(model, np.array([token])) - want).max() <= 2e-5 * np.ptp(want)


def apart(model: onnx.ModelProto) -> None:
    """Every ``integers * (a * b)`` of an expert as ``(integers * a) * b``."""
    makers = {o: n for n in model.graph.node for o in n.output}
    dims = {t.name: list(t.dims) for t in model.graph.initializer}
    for node in list(model.graph.node):
        both = [makers.get(name) for name in node.input]
        if node.op_type != "Mul" or [n and n.op_type for n in both] != ["Cast", "Mul"]:
            continue
        integers, pair = both
        assert integers is not None and pair is not None
        if FFN not in dims[makers[integers.input[0]].input[1]]:
            continue
        place = list(model.graph.node).index(node)
        half = f"{node.output[0]}.half"
        first = helper.make_node("Mul", [integers.output[0], pair.input[0]], [half])
        model.graph.node.insert(place, first)
        node.input[:] = [half, pair.input[1]]


def rounded_expert(form: QuantFormat) -> onnx.ModelProto:
    """One expert's product with activations rounded by a constant scale."""
    model = build(TINY)
    tensors = {t.name: t for t in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in tensors]
    node = next(n for n in products if tensors[n.input[1]].dims[0] == FFN)
    grid = [
        numpy_helper.from_array(np.array(0.02, np.float32), "grid.scale"),
        numpy_helper.from_array(np.array(0, np.int8), "grid.zero"),
    ]
    model.graph.initializer.extend(grid)
    names = [t.name for t in grid]
    before = [helper.make_node("QuantizeLinear", [node.input[0], *names], ["rounded"])]
    if form == QuantFormat.QDQ:
        before.append(helper.make_node("DequantizeLinear", ["rounded", *names], ["restored"]))
        node.input[0] = "restored"
    else:
        weight = numpy_helper.to_array(tensors[node.input[1]])
        integers = np.rint(weight / 0.02).clip(-127, 127).astype(np.int8)
        model.graph.initializer.append(numpy_helper.from_array(integers, "integers"))
        inputs = ["rounded", *names, "integers", *names, *names]
        before.append(helper.make_node("QLinearMatMul", inputs, ["product"]))
        after = helper.make_node("DequantizeLinear", ["product", *names], [node.output[0]])
        before.append(after)
    place = list(model.graph.node).index(node)
    if form == QuantFormat.QOperator:
        model.graph.node.remove(node)
    for new in reversed(before):
        model.graph.node.insert(place, new)
    return model


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (QuantFormat.QDQ, "that expert 1 has no counterpart of"),
        (QuantFormat.QOperator, "experts in different formats"),
    ],
    ids=str,
)
def test_a_rounding_of_one_expert_alone_is_refused_and_never_left_out(
    form: QuantFormat, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedOpError, match=words):
        import_onnx(save(rounded_expert(form), tmp_path), context=24)
