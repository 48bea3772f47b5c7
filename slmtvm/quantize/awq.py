"""Activation-aware weight quantization: features that matter get finer steps (arXiv:2306.00978).

Input features of a layer are scaled up before its weight is rounded, and the value that feeds them
is scaled down by as much. The latter is free where that value is a norm's: its gamma takes it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

from slmtvm.quantize.layers import Layer, weight_of

_EXPONENTS = np.linspace(0.0, 1.0, 21)[1:]  # of the mean size of a feature; 0 is no scaling

Array = npt.NDArray[np.float32]


def scale_salient_features(
    model: ModelProto,
    layers: Sequence[Layer],
    moments: Mapping[str, Array],
    *,
    bits: int,
    group: int,
    symmetric: bool,
) -> int:
    """Rescale weights and gammas of ``model`` in place; returns how many norms took a scale.

    ``moments``: as ``second_moments`` gives them. The scales are those with the least squared error
    of all layers that read one value, searched along powers of that value's mean size.
    """
    readers: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        readers[layer.x].append(layer)
    scaled = 0
    for x, group_of_layers in readers.items():
        gammas = _gammas(model, x, {layer.name for layer in group_of_layers})
        if gammas is None:
            continue
        weights = [weight_of(model, layer) for layer in group_of_layers]
        scale = _best_scale(weights, moments[x], bits=bits, group=group, symmetric=symmetric)
        if scale is None:
            continue
        for layer, weight in zip(group_of_layers, weights, strict=True):
            _replace(model, layer.weight, weight * scale[:, None])
        for gamma in gammas:
            _replace(model, gamma, _read(model, gamma) / scale)
        scaled += 1
    return scaled


def _best_scale(
    weights: Sequence[Array], moment: Array, *, bits: int, group: int, symmetric: bool
) -> Array | None:
    """Scales (k,) with less error than none, or None."""

    def error(scale: Array | float) -> float:
        total = 0.0
        for weight in weights:
            column = np.broadcast_to(np.float32(scale), weight.shape[:1])[:, None]
            off = round_blocks(weight * column, bits, group, symmetric) / column - weight
            total += float(np.einsum("kn,kj,jn->", off, moment, off, optimize=True))
        return total

    size = np.sqrt(np.maximum(np.diag(moment), 1e-12))
    best, least = None, error(1.0)
    for exponent in _EXPONENTS:
        scale = size**exponent
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        found = error(scale)
        if found < least:
            best, least = scale, found
    return best


def round_blocks(weight: Array, bits: int, group: int, symmetric: bool) -> Array:
    """``weight`` (k, n) rounded to the nearest step in blocks of ``group`` along k."""
    k, n = weight.shape
    padded = np.zeros((-(-k // group) * group, n), np.float32)
    padded[:k] = weight
    blocks = padded.reshape(-1, group, n)
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    levels = (1 << bits) - 1
    if symmetric:
        largest = np.where(np.abs(high) > np.abs(low), high, low)
        scale = largest / np.float32(-(1 << (bits - 1)))
        zero = np.float32(1 << (bits - 1))
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = (high - low) / np.float32(levels)
        zero = np.rint(np.divide(-low, scale, out=np.zeros_like(low), where=scale != 0))
    steps = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0)
    rounded = (np.clip(np.rint(steps + zero), 0, levels) - zero) * scale
    return np.asarray(rounded.reshape(-1, n)[:k], np.float32)


def _gammas(model: ModelProto, x: str, readers: set[str]) -> list[str] | None:
    """The vectors that scale ``x``, where it is a norm's result that only ``readers`` read."""
    if any(x in node.input and node.name not in readers for node in model.graph.node):
        return None
    if any(output.name == x for output in model.graph.output):
        return None
    node = next((n for n in model.graph.node if x in n.output), None)
    if node is None:
        return None
    candidates = _scaling_inputs(model, node)
    vectors = [name for name in candidates if _read_once(model, name)]
    return vectors if candidates and vectors == candidates else None


def _scaling_inputs(model: ModelProto, node: NodeProto) -> list[str]:
    """The constant vectors of ``node`` that scale its result; an Add is the end of a layer norm."""
    vectors = {t.name for t in model.graph.initializer if len(t.dims) == 1 and t.dims[0] > 1}
    if node.op_type == "Mul":
        return [name for name in node.input if name in vectors]
    if node.op_type == "LayerNormalization":
        return [name for name in node.input[1:3] if name in vectors]
    if node.op_type in ("SimplifiedLayerNormalization", "RMSNormalization"):
        return [name for name in node.input[1:2] if name in vectors]
    if node.op_type != "Add":
        return []
    shift = [name for name in node.input if name in vectors]
    product = next(
        (n for n in model.graph.node if n.op_type == "Mul" and n.output[0] in node.input), None
    )
    if len(shift) != 1 or product is None or not _read_once(model, product.output[0]):
        return []
    gamma = [name for name in product.input if name in vectors]
    return shift + gamma if len(gamma) == 1 and _read_once(model, gamma[0]) else []


def _read_once(model: ModelProto, name: str) -> bool:
    return sum(name in node.input for node in model.graph.node) == 1


def _read(model: ModelProto, name: str) -> Array:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    return numpy_helper.to_array(tensor).astype(np.float32)


def _replace(model: ModelProto, name: str, value: Array) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    dtype = numpy_helper.to_array(tensor).dtype
    tensor.CopyFrom(numpy_helper.from_array(value.astype(dtype), name))
