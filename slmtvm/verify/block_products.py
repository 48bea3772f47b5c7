"""MatMulNBits (com.microsoft) with its weights written out in float32.

For the forms of it that an onnxruntime computes wrongly; see ``known_sums``. Activations are not
rounded then, whatever the accuracy level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]
_FLOAT = onnx.TensorProto.FLOAT
_OPERANDS = ("weight", "scales", "zero_points", "group_index", "bias")  # from the second input on


def float_weights(attributes: Mapping[str, int], operands: Mapping[str, Array]) -> Array:
    """The weight float32 (K, N) of a node with these attributes and constant operands by name.

    Its values are unsigned, ``bits`` of them in a byte from the low bits on, in blocks along K; a
    zero point that is not given is half of their range. Source: onnxruntime, ContribOperators.md.
    """
    n, k, block = attributes["N"], attributes["K"], attributes["block_size"]
    bits, groups = attributes.get("bits", 4), -(-k // block)
    values = _unpacked(operands["weight"].reshape(n, -1), bits)[:, :k].astype(np.float32)
    scales = operands["scales"].astype(np.float32).reshape(n, groups)
    zeros = operands.get("zero_points")
    if zeros is None:
        offsets = np.full((n, groups), 1 << (bits - 1), np.float32)
    elif zeros.dtype == np.uint8:
        offsets = _unpacked(zeros.reshape(n, -1), bits)[:, :groups].astype(np.float32)
    else:
        offsets = zeros.astype(np.float32).reshape(n, groups)
    index = operands.get("group_index")
    group = np.arange(k) // block if index is None else index.reshape(-1)[:k].astype(np.int64)
    weight: Array = np.ascontiguousarray(((values - offsets[:, group]) * scales[:, group]).T)
    return weight


def with_float_weights(
    model: onnx.ModelProto, wanted: Callable[[onnx.NodeProto], bool], folder: Path | None
) -> None:
    """Put products of floats in the place of the MatMulNBits nodes that are ``wanted``.

    ``model`` is changed in place; ``folder`` holds its external data. Nodes whose operands are not
    constants stay.
    """
    constants = {t.name: t for t in model.graph.initializer}
    for graph in _graphs(model.graph):
        constants |= {t.name: t for t in graph.initializer}
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            given = dict(zip(_OPERANDS, node.input[1:], strict=False))
            given = {role: name for role, name in given.items() if name}
            if wanted(node) and all(name in constants for name in given.values()):
                operands = {role: _array(constants[name], folder) for role, name in given.items()}
                attributes = {a.name: a.i for a in node.attribute}
                name = f"slmtvm.float.{node.output[0]}"
                graph.initializer.append(
                    numpy_helper.from_array(float_weights(attributes, operands), name)
                )
                nodes += _product(node, name, given.get("bias", ""), operands["scales"].dtype)
            else:
                nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
        del graph.node[:]
        graph.node.extend(nodes)


def _product(
    node: onnx.NodeProto, weight: str, bias: str, dtype: np.dtype[np.generic]
) -> Iterator[onnx.NodeProto]:
    """x @ weight + bias in float32, cast from and to what the node computes in."""
    x, y = node.input[0], node.output[0]
    wide, sum_, cast_bias = (f"slmtvm.{part}.{y}" for part in ("wide", "sum", "bias"))
    yield helper.make_node("Cast", [x], [wide], to=_FLOAT)
    yield helper.make_node("MatMul", [wide, weight], [f"{sum_}.product" if bias else sum_])
    if bias:
        yield helper.make_node("Cast", [bias], [cast_bias], to=_FLOAT)
        yield helper.make_node("Add", [f"{sum_}.product", cast_bias], [sum_])
    yield helper.make_node("Cast", [sum_], [y], to=helper.np_dtype_to_tensor_dtype(dtype))


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, then those in its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _unpacked(rows: Array, bits: int) -> Array:
    """uint8 (n, bytes) as uint8 (n, values)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values = (rows[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(values.reshape(len(rows), -1))


def _array(tensor: onnx.TensorProto, folder: Path | None) -> Array:
    return numpy_helper.to_array(tensor, str(folder or ""))
