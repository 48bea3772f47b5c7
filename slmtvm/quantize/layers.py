"""The layers of a file that can be quantized, each brought to one form: MatMul by a constant."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Array = npt.NDArray[np.float32]

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Layer:
    """``MatMul(x, weight)``: its node's name, the value ``x``, and the constant (k, n)."""

    name: str
    x: str
    weight: str
    shape: tuple[int, int]


def normalise(model: ModelProto) -> None:
    """Rewrite ``model`` in place so that every linear layer is a named MatMul by an initializer.

    Gemm becomes MatMul and Add, and a constant that is transposed or cast on its way becomes an
    initializer of its own: onnxruntime's quantizers pass over all of these.
    """
    constants = {t.name: t for t in model.graph.initializer}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            tensor = node.attribute[0].t
            if tensor.data_type in _FLOATS and len(tensor.dims) == 2:
                constants[node.output[0]] = _add(
                    model, numpy_helper.to_array(tensor), node.output[0]
                )
                continue
        if node.op_type == "Transpose" and _is_matrix(constants.get(node.input[0])):
            value = numpy_helper.to_array(constants[node.input[0]])
            permutation = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
            constants[node.output[0]] = _add(model, value.transpose(permutation), node.output[0])
            continue
        if node.op_type == "Gemm" and _is_matrix(constants.get(node.input[1])):
            nodes += _without_gemm(model, node, constants) or [node]
            continue
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_unused(model)
    _name_all(model)


def _is_matrix(tensor: TensorProto | None) -> bool:
    return tensor is not None and len(tensor.dims) == 2 and tensor.data_type in _FLOATS


def _add(model: ModelProto, value: npt.NDArray[np.generic], name: str) -> TensorProto:
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return model.graph.initializer[-1]


def _without_gemm(
    model: ModelProto, node: NodeProto, constants: dict[str, TensorProto]
) -> list[NodeProto] | None:
    """MatMul and Add for a Gemm of the usual kind, or None for another."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    factors = {attributes.get(name, 1.0) for name in ("alpha", "beta")}
    if attributes.get("transA", 0) or factors != {1.0}:
        return None
    weight = node.input[1]
    if attributes.get("transB", 0):
        name = f"{weight}_transposed"
        if name not in constants:
            constants[name] = _add(model, numpy_helper.to_array(constants[weight]).T, name)
        weight = name
    output = node.output[0]
    if len(node.input) < 3 or not node.input[2]:
        return [helper.make_node("MatMul", [node.input[0], weight], [output], name=node.name)]
    product = f"{output}_without_bias"
    return [
        helper.make_node("MatMul", [node.input[0], weight], [product], name=node.name),
        helper.make_node("Add", [product, node.input[2]], [output], name=f"{node.name}_bias"),
    ]


def _drop_unused(model: ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    used.update(output.name for output in model.graph.output)
    for node in model.graph.node:
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                used.update(name for inner in graph.node for name in inner.input)
    kept = [t for t in model.graph.initializer if t.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _name_all(model: ModelProto) -> None:
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        name = node.name or f"{node.op_type}_{index}"
        node.name = name if name not in seen else f"{name}_{index}"
        seen.add(node.name)


def find_layers(model: ModelProto, exclude: Collection[str] = ()) -> list[Layer]:
    """The layers that can be quantized, in the file's order, but for those that ``exclude`` names.

    ``exclude`` holds shell patterns of names of nodes or of their weights.
    """
    constants = {t.name: t for t in model.graph.initializer if _is_matrix(t)}
    layers = []
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in constants:
            continue
        k, n = constants[node.input[1]].dims
        layer = Layer(node.name, node.input[0], node.input[1], (int(k), int(n)))
        names = (layer.name, layer.weight)
        if not any(fnmatchcase(name, pattern) for pattern in exclude for name in names):
            layers.append(layer)
    return layers


def weight_of(model: ModelProto, layer: Layer) -> Array:
    """The weight (k, n) of ``layer`` as float32."""
    tensor = next(t for t in model.graph.initializer if t.name == layer.weight)
    return numpy_helper.to_array(tensor).astype(np.float32)


def quantized_weight(model: ModelProto, layer: Layer) -> Array | None:
    """What MatMulNBits of that name multiplies by, float32 (k, n); None where there is none."""
    suffixes = ("", "_Q4", "_Q8")
    names = {layer.name + suffix for suffix in suffixes}
    node = next(
        (n for n in model.graph.node if n.op_type == "MatMulNBits" and n.name in names), None
    )
    if node is None:
        return None
    constants = {t.name: t for t in model.graph.initializer if t.name in set(node.input)}
    arrays = [numpy_helper.to_array(constants[name]) for name in node.input[1:] if name]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return _decode(arrays, attributes["bits"], attributes["K"], attributes["N"])


def _decode(arrays: list[npt.NDArray[np.generic]], bits: int, k: int, n: int) -> Array:
    packed, scales = arrays[0], arrays[1].astype(np.float32).reshape(n, -1)
    blocks = scales.shape[1]
    values = _unpack(packed.reshape(n, -1), bits).reshape(n, blocks, -1).astype(np.float32)
    offset: float | Array = float(1 << (bits - 1))
    if len(arrays) > 2:
        offset = _unpack(arrays[2].reshape(n, -1), bits)[:, :blocks, None].astype(np.float32)
    whole = ((values - offset) * scales[:, :, None]).reshape(n, -1)[:, :k]
    return np.ascontiguousarray(whole.T)


def _unpack(packed: npt.NDArray[np.generic], bits: int) -> npt.NDArray[np.uint8]:
    """uint8 (rows, bytes) -> values (rows, bytes * 8 / bits), the low bits first."""
    data = packed.astype(np.uint8)
    parts = [(data >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(len(data), -1)


def replace_weight(model: ModelProto, layer: Layer, weight: Array) -> None:
    """Make ``weight`` (k, n) that of ``layer``, in the type that it has in the file."""
    tensor = next(t for t in model.graph.initializer if t.name == layer.weight)
    dtype = numpy_helper.to_array(tensor).dtype
    tensor.CopyFrom(numpy_helper.from_array(weight.astype(dtype), layer.weight))
