"""Linear layers as other operators, as exports for accelerators and other tools write them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from corpus.transforms import add

_SOURCES = ("llama-optimum-past", "bert-optimum", "gpt2-script-masked")


def _layers(model: onnx.ModelProto) -> Iterator[tuple[int, onnx.NodeProto, onnx.TensorProto]]:
    """The products of rows with a float matrix: place, node and matrix, the last one first."""
    tensors = {t.name: t for t in model.graph.initializer if len(t.dims) == 2}
    for place, node in reversed(list(enumerate(model.graph.node))):
        if node.op_type == "MatMul" and node.input[1] in tensors:
            tensor = tensors[node.input[1]]
            if tensor.data_type == onnx.TensorProto.FLOAT:
                yield place, node, tensor


def _rewritten(form: str, source: Path, target: Path) -> None:
    model = onnx.load(source)
    made: dict[str, str] = {}
    for place, node, tensor in list(_layers(model)):
        x, y = node.input[0], node.output[0]
        weight = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
        if form == "conv2d":
            weight = weight[:, :, None, None]
        if form == "conv1d":
            weight = weight[:, :, None]
        if form != "einsum" and tensor.name not in made:
            made[tensor.name] = f"{tensor.name}.by_output"
            model.graph.initializer.append(numpy_helper.from_array(weight, made[tensor.name]))
        nodes = _FORMS[form](x, made.get(tensor.name, tensor.name), y)
        model.graph.node.remove(node)
        for offset, new in enumerate(nodes):
            model.graph.node.insert(place + offset, new)
    model.graph.initializer.append(numpy_helper.from_array(np.array([2]), "layers.two"))
    onnx.save(model, target)


def _einsum(x: str, weight: str, y: str) -> list[onnx.NodeProto]:
    return [helper.make_node("Einsum", [x, weight], [y], equation="...d,de->...e")]


def _turned(x: str, y: str, inner: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """What works on columns of tokens between two transpositions."""
    first = helper.make_node("Transpose", [x], [f"{y}.columns"], perm=[0, 2, 1])
    return [first, *inner, helper.make_node("Transpose", [f"{y}.made"], [y], perm=[0, 2, 1])]


def _conv1d(x: str, weight: str, y: str) -> list[onnx.NodeProto]:
    conv = helper.make_node("Conv", [f"{y}.columns", weight], [f"{y}.made"], kernel_shape=[1])
    return _turned(x, y, [conv])


def _conv2d(x: str, weight: str, y: str) -> list[onnx.NodeProto]:
    wide, made = f"{y}.wide", f"{y}.made_wide"
    inner = [
        helper.make_node("Unsqueeze", [f"{y}.columns", "layers.two"], [wide]),
        helper.make_node("Conv", [wide, weight], [made], kernel_shape=[1, 1]),
        helper.make_node("Squeeze", [made, "layers.two"], [f"{y}.made"]),
    ]
    return _turned(x, y, inner)


def _weight_first(x: str, weight: str, y: str) -> list[onnx.NodeProto]:
    return _turned(x, y, [helper.make_node("MatMul", [weight, f"{y}.columns"], [f"{y}.made"])])


_FORMS = {
    "einsum": _einsum, "conv1d": _conv1d, "conv2d": _conv2d, "weight-first": _weight_first,
}  # fmt: skip
for _name in _FORMS:
    add(_name, partial(_rewritten, _name), *_SOURCES)
