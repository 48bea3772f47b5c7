"""An exporter's graph without its weights, and the one small weights file that fills them all.

The weights file holds every matrix as int8 with one float32 scale a row, every vector in float16;
the model's float32 weights are what they dequantize to, in all forms alike. A skeleton is the
exporter's file itself, but a weight's initializer has no data: its ``doc_string`` names the tensor
of the weights file, followed by ``.T`` where the exporter stored it transposed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

_SCALES = ".scales"
_TRANSPOSED = ".T"
_SMALLEST_WEIGHT = 256  # elements; what is smaller belongs to the graph and stays in it


def compress(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Named float weights -> the arrays of the weights file."""
    arrays = {}
    for name, value in weights.items():
        if value.ndim == 1:
            arrays[name] = value.astype(np.float16)
            continue
        scales = (np.abs(value).max(axis=1) / 127).astype(np.float32)
        arrays[name] = np.rint(value / scales[:, None]).astype(np.int8)
        arrays[name + _SCALES] = scales
    return arrays


def decompress(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of the weights file -> named float32 weights."""
    weights = {}
    for name, value in arrays.items():
        if name.endswith(_SCALES):
            continue
        weights[name] = value.astype(np.float32)
        if value.dtype == np.int8:
            weights[name] *= arrays[name + _SCALES][:, None]
    return weights


def load(path: Path) -> dict[str, np.ndarray]:
    """The float32 weights of a weights file."""
    with np.load(path) as file:
        return decompress(dict(file))


def strip(model: onnx.ModelProto, weights: dict[str, np.ndarray]) -> None:
    """Empty every initializer that is one of ``weights`` or its transpose; others must be small."""
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.size < _SMALLEST_WEIGHT:
            continue
        assert not tensor.doc_string, tensor.name
        tensor.doc_string = _source(value, weights)
        tensor.ClearField("raw_data")


def _source(value: np.ndarray, weights: dict[str, np.ndarray]) -> str:
    for name, weight in weights.items():
        if np.array_equal(value, weight):
            return name
        if np.array_equal(value, weight.T):
            return name + _TRANSPOSED
    raise ValueError(f"an initializer of shape {value.shape} is none of the weights")


def fill(model: onnx.ModelProto, weights: dict[str, np.ndarray]) -> None:
    """Give a skeleton its weights; after that it is as its exporter wrote it."""
    for tensor in model.graph.initializer:
        if not tensor.doc_string:
            continue
        name = tensor.doc_string.removesuffix(_TRANSPOSED)
        value = weights[name].T if tensor.doc_string.endswith(_TRANSPOSED) else weights[name]
        assert list(value.shape) == list(tensor.dims), tensor.name
        tensor.raw_data = np.ascontiguousarray(value, np.float32).tobytes()
        tensor.ClearField("doc_string")
