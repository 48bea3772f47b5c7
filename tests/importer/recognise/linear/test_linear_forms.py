"""Linear layers in other operators than MatMul and Gemm: convolutions, Einsum, weights first."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.quantized import TINY, TOKENS, TOLERANCE, check
from tests.importer.test_import_spellings import calls_of, op_names

WITH_BIAS = Tiny(hidden=40, heads=4, kv_heads=2, head_dim=12, ffn=72, rope="rotate_half", bias=True)


class Rewriter:
    """Writes each product with a weight in another way."""

    def __init__(self, model: onnx.ModelProto, form: str) -> None:
        self.form, self.count = form, 0
        self.weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.constants: dict[str, np.ndarray] = {
            "perm.axis": np.array([2]), "places": np.array([-1, 40]),
        }  # fmt: skip
        self.nodes: list[onnx.NodeProto] = []
        for node in model.graph.node:
            if node.op_type == "MatMul" and node.input[1] in self.weights:
                self.write(*node.input, node.output[0])
            else:
                self.nodes.append(node)
        del model.graph.node[:]
        model.graph.node.extend(self.nodes)
        kept = {i for node in self.nodes for i in node.input}
        old = [t for t in model.graph.initializer if t.name in kept]
        del model.graph.initializer[:]
        model.graph.initializer.extend(old)
        new = {k: v for k, v in self.constants.items() if k in kept}
        model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in new.items())

    def op(self, kind: str, *inputs: str, out: str = "", **attrs) -> str:
        self.count += 1
        out = out or f"new{self.count}"
        self.nodes.append(helper.make_node(kind, inputs, [out], f"new{self.count}", **attrs))
        return out

    def constant(self, value: np.ndarray) -> str:
        name = f"new.c{len(self.constants)}"
        self.constants[name] = value
        return name

    def write(self, x: str, name: str, y: str) -> None:
        weight = self.weights[name]
        by_output = np.ascontiguousarray(weight.T)
        if self.form == "einsum":
            self.op("Einsum", x, name, out=y, equation="bsd,de->bse")
        elif self.form == "einsum, weight first":
            self.op("Einsum", self.constant(by_output), x, out=y, equation="ed,bsd->bse")
        elif self.form == "weight first":
            turned = self.op("Transpose", x, perm=[0, 2, 1])
            product = self.op("MatMul", self.constant(by_output), turned)
            self.op("Transpose", product, out=y, perm=[0, 2, 1])
        elif self.form == "gemm, weight first":
            flat = self.op("Reshape", x, self.constant(np.array([-1, weight.shape[0]])))
            product = self.op("Gemm", name, flat, transA=1, transB=1)
            turned = self.op("Transpose", product, perm=[1, 0])
            self.op("Unsqueeze", turned, self.constant(np.array([0])), out=y)
        elif self.form == "gemm, columns":
            flat = self.op("Reshape", x, self.constant(np.array([-1, weight.shape[0]])))
            columns = self.op("Transpose", flat, perm=[1, 0])
            product = self.op("Gemm", columns, name, transA=1)
            self.op("Unsqueeze", product, self.constant(np.array([0])), out=y)
        else:
            self.convolution(x, by_output, y)

    def convolution(self, x: str, by_output: np.ndarray, y: str) -> None:
        value, places = self.op("Transpose", x, perm=[0, 2, 1]), int(self.form[-2])
        shape = (*by_output.shape, *[1] * places)
        axes = self.constant(np.array([2]))
        if places == 2:
            value = self.op("Unsqueeze", value, axes)
        kernel = self.constant(by_output.reshape(shape))
        value = self.op("Conv", value, kernel, kernel_shape=[1] * places)
        if places == 2:
            value = self.op("Squeeze", value, axes)
        self.op("Transpose", value, out=y, perm=[0, 2, 1])


FORMS = (
    "conv1d", "conv2d", "einsum", "einsum, weight first", "weight first", "gemm, weight first",
    "gemm, columns",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_linear_layer_is_one(form, tmp_path):
    model = build(WITH_BIAS)
    Rewriter(model, form)
    imported = check(save(model, tmp_path))
    plain = check(save(build(WITH_BIAS), tmp_path, "plain.onnx"))
    assert sorted(op_names(imported)) == sorted(op_names(plain))


def in_bytes(model: onnx.ModelProto) -> None:
    """Weights of convolutions as int8 behind DequantizeLinear, a scale for each output."""
    arrays = {t.name: t for t in model.graph.initializer}
    nodes = []
    for node in list(model.graph.node):
        if node.op_type == "Conv":
            name = node.input[1]
            weight = numpy_helper.to_array(arrays[name])
            scales = np.abs(weight).max(axis=(1, *range(2, weight.ndim))) / 127
            levels = np.round(weight / scales.reshape(-1, *[1] * (weight.ndim - 1)))
            model.graph.initializer.remove(arrays[name])
            model.graph.initializer.extend(
                [
                    numpy_helper.from_array(levels.astype(np.int8), f"{name}.q"),
                    numpy_helper.from_array(scales.astype(np.float32), f"{name}.s"),
                ]
            )
            inputs = [f"{name}.q", f"{name}.s"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [name], axis=0))
    old = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *old])


@pytest.mark.parametrize("form", ["conv1d", "conv2d"])
def test_bytes_of_a_convolution_s_weights_stay_bytes(form, tmp_path):
    model = build(TINY)
    Rewriter(model, form)
    in_bytes(model)
    imported = check(save(model, tmp_path))
    assert {str(c.attrs["format"]) for c in calls_of(imported, "slm.linear")} == {"int8"}


def test_a_dynamically_quantized_convolution_of_one_place_is_a_layer(tmp_path):
    model = build(TINY)
    Rewriter(model, "conv2d")
    path = save(model, tmp_path)
    quantized = tmp_path / "quantized.onnx"
    quantize_dynamic(path, quantized, weight_type=QuantType.QUInt8)
    kinds = {node.op_type for node in onnx.load(quantized).graph.node}
    assert "ConvInteger" in kinds and "Conv" not in kinds
    imported = import_onnx(quantized, context=32)
    layers = {(str(c.attrs["format"]), str(c.attrs["activation"])) for c in
              calls_of(imported, "slm.linear")}  # fmt: skip
    assert layers == {("int8", "row_u8")}
    tokens = TOKENS[:1]  # the whole tensor is one row
    want = run_onnxruntime(quantized, tokens)
    assert np.abs(evaluate(imported, tokens) - want).max() <= TOLERANCE * np.ptp(want)


@pytest.mark.parametrize(
    ("kernel", "attributes", "said"),
    [
        ((40, 40, 1, 2), {"pads": [0, 1, 0, 0]}, r"a convolution of \[1, 40, 1, \d+\] by a weight"),
        ((40, 20, 1, 1), {"group": 2}, "linear layers written as one"),
        ((40, 40, 1, 1), {"strides": [1, 2]}, "linear layers written as one"),
    ],
)
def test_another_convolution_of_two_axes_is_refused_for_what_it_is(
    kernel, attributes, said, tmp_path
):
    model = build(TINY)
    Rewriter(model, "conv2d")
    node = next(n for n in model.graph.node if n.op_type == "Conv")
    del node.attribute[:]
    for name, value in attributes.items():
        node.attribute.append(helper.make_attribute(name, value))
    weight = next(t for t in model.graph.initializer if t.name == node.input[1])
    weight.CopyFrom(numpy_helper.from_array(np.zeros(kernel, np.float32), weight.name))
    with pytest.raises(UnsupportedOpError, match=rf"Conv node '{node.name}'.*{said}"):
        import_onnx(save(model, tmp_path), context=32)
