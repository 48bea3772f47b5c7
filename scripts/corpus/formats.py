"""Formats of weights that onnxruntime runs and none of its quantizers here writes, or not alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from corpus.pruned import PATTERNS, Pattern
from corpus.quantizations import NBITS_SOURCES, quantize_nbits
from corpus.transforms import add, transform

_SMALLEST_MATRIX = 1024  # elements


# ---- inputs of MatMulNBits


def _nbits_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    return (node for node in model.graph.node if node.op_type == "MatMulNBits")


@transform("int4-float-zp", *NBITS_SOURCES)
def _float_zero_points(source: Path, target: Path) -> None:
    """Zero points as floats, between the integers."""
    quantize_nbits(source, target, block_size=32, is_symmetric=False, accuracy_level=0)
    model = onnx.load(target)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in _nbits_nodes(model):
        scales = numpy_helper.to_array(constants[node.input[2]])
        packed = numpy_helper.to_array(constants[node.input[3]]).reshape(_n(node), -1)
        values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(_n(node), -1)
        blocks = scales.size // _n(node)
        floats = values[:, :blocks].astype(np.float32) + 0.25
        constants[node.input[3]].CopyFrom(
            numpy_helper.from_array(floats.reshape(scales.shape), node.input[3])
        )
    onnx.save(model, target)


@transform("int4-g-idx", *NBITS_SOURCES)
def _group_indices(source: Path, target: Path) -> None:
    """Rows of the matrix belong to groups in a random order, as GPTQ's act-order leaves them."""
    quantize_nbits(source, target, block_size=16, is_symmetric=True, accuracy_level=0)
    model = onnx.load(target)
    for node in _nbits_nodes(model):
        k, block = _attribute(node, "K"), _attribute(node, "block_size")
        groups = np.arange(-(-k // block) * block, dtype=np.int32) // block
        order = np.random.default_rng(k).permutation(k)
        groups[:k] = groups[:k][order]
        name = f"{node.name}.g_idx"
        model.graph.initializer.append(numpy_helper.from_array(groups, name))
        node.input.extend([""] * (4 - len(node.input)) + [name])
    onnx.save(model, target)


@transform("int4-bias", "qwen2-dynamo", "gpt2-dynamo-masked")
def _biases(source: Path, target: Path) -> None:
    """The Add after a product is an input of the product."""
    quantize_nbits(source, target, block_size=32, is_symmetric=True)
    model = onnx.load(target)
    constants = {tensor.name for tensor in model.graph.initializer}
    adds = {}
    for node in model.graph.node:
        if node.op_type == "Add":
            for value, bias in (node.input, reversed(node.input)):
                if bias in constants:
                    adds[value] = (node, bias)
    for node in list(_nbits_nodes(model)):
        if node.output[0] in adds:
            addition, bias = adds[node.output[0]]
            node.input.extend([""] * (5 - len(node.input)) + [bias])
            node.output[0] = addition.output[0]
            model.graph.node.remove(addition)
    onnx.save(model, target)


def _n(node: onnx.NodeProto) -> int:
    return _attribute(node, "N")


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next(int(a.i) for a in node.attribute if a.name == name)


# ---- weights that a node before the product restores


def _stored_as(kind: int, source: Path, target: Path) -> None:
    """Matrices stored in a 16-bit float and cast when read: activations stay in float32."""
    model = onnx.load(source)
    for tensor, name in _matrices(model):
        value = numpy_helper.to_array(tensor)
        small = helper.make_tensor(name, kind, value.shape, _bits(value, kind), raw=True)
        _replace(model, tensor, [small], [helper.make_node("Cast", [name], [tensor.name], to=1)])
    onnx.save(model, target)


def _bits(value: np.ndarray, kind: int) -> bytes:
    return value.astype(helper.tensor_dtype_to_np_dtype(kind)).tobytes()


for _name, _kind in (("fp16-weights", TensorProto.FLOAT16), ("bf16-weights", TensorProto.BFLOAT16)):
    add(_name, partial(_stored_as, _kind), "llama-optimum-past", "bert-dynamo")


def _cast_and_scaled(source: Path, target: Path) -> None:
    """Matrices in int8 with a scale for each output, restored by Cast and Mul."""
    model = onnx.load(source)
    for tensor, name in _matrices(model):
        value = numpy_helper.to_array(tensor)
        scale = (np.abs(value).max(axis=0, keepdims=True) / 127).astype(np.float32)
        levels = np.rint(value / scale).astype(np.int8)
        parts = [
            numpy_helper.from_array(levels, name),
            numpy_helper.from_array(scale, f"{name}.scale"),
        ]
        nodes = [
            helper.make_node("Cast", [name], [f"{name}.float"], to=1),
            helper.make_node("Mul", [f"{name}.float", f"{name}.scale"], [tensor.name]),
        ]
        _replace(model, tensor, parts, nodes)
    onnx.save(model, target)


add("int8-by-cast", _cast_and_scaled, "llama-optimum-past", "bert-dynamo")


def _blocked(axis: int, symmetric: bool, source: Path, target: Path) -> None:
    """Blocked int4 DequantizeLinear of opset 21, blocks along either axis of the matrix (K, N)."""
    model = onnx.load(source)
    block = 16 if axis == 0 else 8
    for tensor, name in _matrices(model):
        value = numpy_helper.to_array(tensor)
        if value.shape[axis] % block:
            continue
        shape = [*value.shape]
        shape[axis : axis + 1] = [shape[axis] // block, block]
        blocks = value.reshape(shape)
        if symmetric:
            scale = np.abs(blocks).max(axis=axis + 1) / 7
            zero = np.zeros_like(scale)
        else:
            low = np.minimum(blocks.min(axis=axis + 1), 0)
            scale = (np.maximum(blocks.max(axis=axis + 1), 0) - low) / 15
            zero = np.rint(-low / scale)
        scale = np.maximum(scale, 1e-6).astype(np.float32)
        spread = partial(np.repeat, repeats=block, axis=axis)
        limits = (-8, 7) if symmetric else (0, 15)
        q = np.clip(np.rint(value / spread(scale)) + spread(zero), *limits).astype(np.int64)
        kind = TensorProto.INT4 if symmetric else TensorProto.UINT4
        parts = [
            helper.make_tensor(name, kind, q.shape, q.ravel()),
            numpy_helper.from_array(scale, f"{name}.scale"),
        ]
        if not symmetric:
            zeros = zero.astype(np.int64)
            parts.append(helper.make_tensor(f"{name}.zero", kind, zeros.shape, zeros.ravel()))
        node = helper.make_node(
            "DequantizeLinear", [p.name for p in parts], [tensor.name], axis=axis, block_size=block
        )
        _replace(model, tensor, parts, [node])
    onnx.save(_with_opset(model, 21), target)


for _name, _axis, _symmetric in (
    ("int4-blocked-axis0", 0, True), ("int4-blocked-axis1", 1, True),
    ("int4-blocked-axis0-zp", 0, False), ("int4-blocked-axis1-zp", 1, False),
):  # fmt: skip
    add(_name, partial(_blocked, _axis, _symmetric), "llama-optimum-past", "bert-dynamo")


def _float8(kind: int, source: Path, target: Path) -> None:
    """Matrices in float8 with a scale for each tensor, dequantized where they are read."""
    model = onnx.load(source)
    top = float(np.array(448.0 if kind == TensorProto.FLOAT8E4M3FN else 57344.0))
    for tensor, name in _matrices(model):
        value = numpy_helper.to_array(tensor)
        scale = np.float32(np.abs(value).max() / top)
        parts = [
            helper.make_tensor(name, kind, value.shape, _bits(value / scale, kind), raw=True),
            numpy_helper.from_array(np.array(scale), f"{name}.scale"),
        ]
        node = helper.make_node("DequantizeLinear", [p.name for p in parts], [tensor.name])
        _replace(model, tensor, parts, [node])
    onnx.save(_with_opset(model, 19), target)


for _name, _kind in (
    ("float8-e4m3", TensorProto.FLOAT8E4M3FN), ("float8-e5m2", TensorProto.FLOAT8E5M2),
):  # fmt: skip
    add(_name, partial(_float8, _kind), "llama-optimum-past", "bert-dynamo")


def _pruned(pattern: Pattern, source: Path, target: Path, *, sparse: bool = False) -> None:
    """Matrices with a pattern of zeros, kept as sparse initializers where ``sparse``."""
    model = onnx.load(source)
    for tensor, _ in list(_matrices(model)):
        value = pattern(numpy_helper.to_array(tensor).T).T
        stored = numpy_helper.from_array(np.ascontiguousarray(value), tensor.name)
        if not sparse:
            tensor.CopyFrom(stored)
            continue
        places = np.flatnonzero(value)
        values = numpy_helper.from_array(value.reshape(-1)[places], tensor.name)
        indices = numpy_helper.from_array(places, f"{tensor.name}.places")
        model.graph.initializer.remove(tensor)
        kept = helper.make_sparse_tensor(values, indices, value.shape)
        model.graph.sparse_initializer.append(kept)
    onnx.save(model, target)


PRUNED_SOURCES = ("llama-optimum-past", "bert-dynamo")
for _name, _pattern in PATTERNS.items():
    add(f"pruned-{_name}", partial(_pruned, _pattern), *PRUNED_SOURCES)
add("pruned-free-sparse", partial(_pruned, PATTERNS["free"], sparse=True), *PRUNED_SOURCES)


def _matrices(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, str]]:
    """The float matrices that a MatMul multiplies by, and a free name beside each."""
    multiplied = {n.input[1] for n in model.graph.node if n.op_type in ("MatMul", "Gemm")}
    for tensor in list(model.graph.initializer):
        large = len(tensor.dims) == 2 and np.prod(tensor.dims) >= _SMALLEST_MATRIX
        if tensor.name in multiplied and large and tensor.data_type == TensorProto.FLOAT:
            yield tensor, f"{tensor.name}.stored"


def _replace(
    model: onnx.ModelProto,
    tensor: onnx.TensorProto,
    parts: list[onnx.TensorProto],
    nodes: list[onnx.NodeProto],
) -> None:
    """Put other initializers in a tensor's place, and nodes that compute it from them, first."""
    model.graph.initializer.remove(tensor)
    model.graph.initializer.extend(parts)
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


def _with_opset(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    if max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")) >= version:
        return model
    return onnx.version_converter.convert_version(model, version)
