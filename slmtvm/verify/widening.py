"""A graph in bfloat16 with the same numbers in float32.

onnxruntime's CPU kernels add and multiply no bfloat16: 1.31 only moves it, casts it and normalizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_TYPES = ("to", "dtype", "output_dtype")  # attributes that name a type
_Attribute = onnx.AttributeProto


def computes_in(kind: int, model: onnx.ModelProto) -> bool:
    """Whether a port or a vector has this type: matrices alone may be stored so, and cast."""
    graph = model.graph
    ports = (p.type.tensor_type.elem_type for p in (*graph.input, *graph.output))
    vectors = (t.data_type for t in graph.initializer if len(t.dims) == 1)
    return kind in (*ports, *vectors)


def in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose tensors, ports and casts are float32 wherever ``model``'s are bfloat16."""
    result = onnx.ModelProto.FromString(model.SerializeToString())
    for graph in _graphs(result.graph):
        del graph.value_info[:]
        for tensor in graph.initializer:
            _widen(tensor)
        for port in (*graph.input, *graph.output):
            if port.type.tensor_type.elem_type == TensorProto.BFLOAT16:
                port.type.tensor_type.elem_type = TensorProto.FLOAT
        _widen_nodes(graph.node)
    for function in result.functions:
        del function.value_info[:]
        _widen_nodes(function.node)
    return result


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == _Attribute.GRAPH:
                yield from _graphs(attribute.g)


def _widen_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == _Attribute.TENSOR:
                _widen(attribute.t)
            elif attribute.name in _TYPES and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.BFLOAT16:
        value = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
