"""A model without its weights: what a user can send when an import fails.

The graph stays as it is; every large weight keeps its name, type and shape and loses its values.
Reading such a file, the importer fills them with random ones: the failure can be seen again.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from slmtvm.importer.read.hub import follow_links

REDACTED = "slmtvm.redacted"  # a key of the model's metadata
_SMALL = 64  # constants of so many elements stay: shapes, axes, frequencies
_FEW = 4  # tables of so few different values are masks, and stay
_STANDARD_DEVIATION = 0.02  # of random weights, as transformers are initialised
# Their tables say what the graph computes.
_TABLE_READERS = ("RotaryEmbedding", "GroupQueryAttention", "SparseAttention")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_BYTES = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4)
_FLOAT8 = tuple(value for name, value in TensorProto.DataType.items() if name.startswith("FLOAT8"))


def redact(path: Path) -> ModelProto:
    """The ONNX file ``path`` with its large weights' values left out; the rest is the same.

    Weights in other files are not read, but for the small ones. Raises what onnx raises.
    """
    model = onnx.load(str(path), load_external_data=False)
    folder = follow_links(model, path)
    sparse = model.graph.sparse_initializer
    for tensor in (*model.graph.initializer, *(t for s in sparse for t in (s.values, s.indices))):
        if tensor.data_location == TensorProto.EXTERNAL and not _is_weight(tensor):
            load_external_data_for_tensor(tensor, str(folder))
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    keep = {
        name for node in model.graph.node if node.op_type in _TABLE_READERS for name in node.input
    }
    for graph in _graphs(model.graph):
        for tensor in graph.initializer:
            if tensor.name not in keep:
                _empty(tensor)
        for part in graph.sparse_initializer:
            _empty(part.values)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    _empty(attribute.t)
    entry = model.metadata_props.add()
    entry.key, entry.value = REDACTED, "1"
    return model


def is_redacted(model: ModelProto) -> bool:
    """Whether ``redact`` made it."""
    return any(entry.key == REDACTED for entry in model.metadata_props)


def fill(model: ModelProto) -> None:
    """Give the weights that ``redact`` emptied random values, in place, the same every time."""
    for graph in _graphs(model.graph):
        tensors = list(graph.initializer)
        tensors += [sparse.values for sparse in graph.sparse_initializer]
        tensors += [a.t for n in graph.node for a in n.attribute if _is_tensor(a)]
        for tensor in tensors:
            if _is_weight(tensor) and not _has_data(tensor):
                _fill(tensor)


def _is_tensor(attribute: onnx.AttributeProto) -> bool:
    return bool(attribute.type == onnx.AttributeProto.TENSOR)


def _graphs(graph: GraphProto) -> list[GraphProto]:
    found = [graph]
    for node in graph.node:
        found += [inner for part in _subgraphs(node) for inner in _graphs(part)]
    return found


def _subgraphs(node: NodeProto) -> list[GraphProto]:
    return [
        graph
        for attribute in node.attribute
        for graph in ([attribute.g] if attribute.HasField("g") else list(attribute.graphs))
    ]


def _is_weight(tensor: TensorProto) -> bool:
    kinds = (*_FLOATS, *_BYTES, *_FLOAT8)
    return tensor.data_type in kinds and math.prod(tensor.dims) > _SMALL


def _has_data(tensor: TensorProto) -> bool:
    if tensor.data_location == TensorProto.EXTERNAL or tensor.HasField("raw_data"):
        return True
    return any((tensor.float_data, tensor.int32_data, tensor.double_data))


def _empty(tensor: TensorProto) -> None:
    if not _is_weight(tensor):
        return
    if tensor.data_type in _FLOATS and tensor.data_location != TensorProto.EXTERNAL:
        values = numpy_helper.to_array(tensor).reshape(-1)
        if len(np.unique(values[: 1 << 16])) <= _FEW and len(np.unique(values)) <= _FEW:
            return
    kept = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    tensor.CopyFrom(kept)


def _fill(tensor: TensorProto) -> None:
    seed = hashlib.sha256(tensor.name.encode()).digest()
    rng = np.random.default_rng(np.frombuffer(seed, np.uint32))
    count = math.prod(tensor.dims)
    if tensor.data_type in _FLOATS:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        # Away from zero and of one sign: what scales must not vanish.
        values = np.abs(rng.normal(scale=_STANDARD_DEVIATION, size=count)) + 1e-4
        if len(tensor.dims) > 1:
            values *= rng.choice((-1, 1), count)
        tensor.raw_data = values.astype(dtype).tobytes()
        return
    four_bits = tensor.data_type in (TensorProto.INT4, TensorProto.UINT4)
    size = (count + 1) // 2 if four_bits else count
    limit = 0x7F if tensor.data_type in _FLOAT8 else 0x100  # 0x7F is NaN in float8
    tensor.raw_data = rng.integers(0, limit, size).astype(np.uint8).tobytes()
