"""The public call: a file, quantized layer by layer, and what that changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, numpy_helper

from slmtvm.errors import SlmError
from slmtvm.quantize import awq, methods, mixed
from slmtvm.quantize.accuracy import compare
from slmtvm.quantize.calibration import (
    Feeds,
    Tokens,
    read_tokens,
    second_moments,
    write,
)
from slmtvm.quantize.layers import Layer, find_layers, normalise, quantized_weight
from slmtvm.quantize.report import LayerError, QuantizeReport
from slmtvm.text import find_tokenizer
from slmtvm.verify.reference import Reference

METHODS = ("rtn", "k-quant", "gptq", "awq", "hqq", "dynamic", "static")
GROUPS = (16, 32, 64, 128, 256)
_NEED_CALIBRATION = ("gptq", "awq", "static")
_INT8 = ("dynamic", "static")
_ALWAYS_ASYMMETRIC = ("k-quant", "hqq")
_K_QUANT_GROUPS = (16, 32)
_NODE_BYTES = 512  # by which a quantized layer's names and attributes may grow the graph

Progress = Callable[[str], None]
Array = npt.NDArray[np.float32]


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    bits: int | str = 4,
    group: int = 32,
    symmetric: bool = False,
    method: str = "rtn",
    calibration: str | Path | None = None,
    tokenizer: str | Path | None = None,
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    size: int | None = None,
    progress: Progress = lambda _: None,
) -> QuantizeReport:
    """Write ``model`` with its linear layers quantized to ``output``.

    Parameters
    ----------
    bits: 4, 8 or "mixed": 8 for the layers where it saves the most error for its bytes, else 4.
    group: weights of a column that share a scale.
    symmetric: no zero points.
    method: one of METHODS. "dynamic" and "static" quantize activations too and have 8 bits; the
        others write MatMulNBits.
    calibration: a text, or token ids in a .npy file: what the methods "gptq", "awq" and "static"
        look at, and what errors of outputs and perplexities are taken on.
    tokenizer: for a calibration text; by default the one beside the model.
    exclude: shell patterns of nodes or weights that are left as they are.
    embeddings: also write embedding tables in 4 bits.
    size: bytes of the file that "mixed" aims at.
    progress: called with the name of each step as it begins.

    Raises SlmError where options contradict each other or a file cannot be used; then no output is
    written.
    """
    source, target = Path(model), Path(output)
    _check(bits, group, symmetric, method, calibration, size)
    progress("read")
    reference = Reference(source)  # says what is wrong with the file
    proto = onnx.load(str(source))
    bytes_before = proto.ByteSize()
    normalise(proto)
    layers = find_layers(proto, exclude)
    if not layers:
        raise SlmError("has no linear layer in float that could be quantized", where=str(source))
    windows: list[Tokens] = []
    moments: Mapping[str, Array] = {}
    if calibration is not None:
        beside = Path(tokenizer) if tokenizer else find_tokenizer(source)
        windows = read_tokens(Path(calibration), beside)
        progress("calibrate")
        moments = second_moments(proto, [layer.x for layer in layers], windows)
    feeds = Feeds(reference, windows) if windows else None
    if method == "awq":
        progress("scale features")
        width = 8 if bits == 8 else 4
        if awq.scale_salient_features(
            proto, layers, moments, bits=width, group=group, symmetric=symmetric
        ):
            moments = second_moments(proto, [layer.x for layer in layers], windows)
    if embeddings:
        proto = methods.quantize_embeddings(proto, group=group, symmetric=symmetric)
    progress("choose bits")
    weights = _Weights(proto, layers, moments)
    if bits == "mixed":
        chosen = _choose(proto, weights, group, symmetric, size)
    else:
        chosen = {layer.name: int(bits) for layer in layers}
    progress(method)
    result = _quantize(proto, layers, chosen, method, group, symmetric, feeds)
    progress("compare")
    rows = tuple(_error(weights, result, layer, chosen[layer.name]) for layer in layers)
    report = QuantizeReport(target, method, bytes_before, result.ByteSize(), rows)
    if windows:
        report = replace(report, **asdict(compare(reference, result, windows)))
    write(result, target)
    return report


def _check(
    bits: int | str,
    group: int,
    symmetric: bool,
    method: str,
    calibration: str | Path | None,
    size: int | None,
) -> None:
    if method not in METHODS:
        raise SlmError(f"method {method!r}; there are {', '.join(METHODS)}")
    if bits not in (4, 8, "mixed"):
        raise SlmError(f"{bits!r} bits; 4, 8 or mixed are supported")
    if group not in GROUPS:
        raise SlmError(f"groups of {group}; {', '.join(map(str, GROUPS))} are supported")
    if method in _NEED_CALIBRATION and calibration is None:
        raise SlmError(f"method {method!r} needs a calibration text or token ids")
    if method in _INT8 and bits != 8:
        raise SlmError(f"method {method!r} quantizes to 8 bits, not {bits}")
    if method in _ALWAYS_ASYMMETRIC and symmetric:
        raise SlmError(f"method {method!r} writes zero points; it cannot be symmetric")
    if method == "k-quant" and group not in _K_QUANT_GROUPS:
        raise SlmError(f"method 'k-quant' takes groups of {_K_QUANT_GROUPS}, not {group}")
    if size is not None and bits != "mixed":
        raise SlmError("a size can be asked for with mixed bits only")


class _Weights:
    """The weights before quantization, and how much an error in one matters."""

    def __init__(
        self, model: ModelProto, layers: Sequence[Layer], moments: Mapping[str, Array]
    ) -> None:
        self.layers = layers
        self._moments = moments
        self._tensors = {t.name: t for t in model.graph.initializer}

    def of(self, layer: Layer) -> Array:
        """The weight (k, n)."""
        return numpy_helper.to_array(self._tensors[layer.weight]).astype(np.float32)

    def square(self, layer: Layer, weight: Array) -> float | None:
        """Mean square of ``x @ weight`` on the calibration tokens, times n; None without tokens."""
        moment = self._moments.get(layer.x)
        if moment is None:
            return None
        return float(np.einsum("kn,kn->", weight, moment @ weight))


def _choose(
    model: ModelProto, weights: _Weights, group: int, symmetric: bool, size: int | None
) -> dict[str, int]:
    """Bits of each layer; ``size`` is of the whole file."""

    def error(layer: Layer, bits: int) -> float:
        weight = weights.of(layer)
        off = awq.round_blocks(weight, bits, group, symmetric) - weight
        square = weights.square(layer, off)
        whole = weights.square(layer, weight)
        if square is None or not whole:
            square, whole = float(np.square(off).sum()), float(np.square(weight).sum())
        return square / whole if whole else 0.0

    saved = {layer.name: error(layer, 4) - error(layer, 8) for layer in weights.layers}
    budget = None
    if size is not None:
        elements = sum(weights.of(layer).nbytes for layer in weights.layers)
        budget = size - (model.ByteSize() - elements) - _NODE_BYTES * len(weights.layers)
    return mixed.choose_bits(weights.layers, saved, group=group, symmetric=symmetric, budget=budget)


def _quantize(
    model: ModelProto,
    layers: Sequence[Layer],
    bits: Mapping[str, int],
    method: str,
    group: int,
    symmetric: bool,
    feeds: Feeds | None,
) -> ModelProto:
    if method in _INT8:
        return methods.quantize_int8(model, layers, static=method == "static", calibration=feeds)
    how = "rtn" if method == "awq" else method
    for width in sorted(set(bits.values())):
        those = [layer for layer in layers if bits[layer.name] == width]
        model = methods.quantize_blocks(
            model, those, method=how, bits=width, group=group, symmetric=symmetric,
            calibration=feeds,
        )  # fmt: skip
    methods.set_accuracy_level(model, methods.INT8_ACTIVATIONS)
    return model


def _error(weights: _Weights, result: ModelProto, layer: Layer, bits: int) -> LayerError:
    found = quantized_weight(result, layer)
    if found is None:
        return LayerError(layer.name, layer.shape, bits, None, None)
    weight = weights.of(layer)
    off = found - weight
    whole = float(np.square(weight).sum())
    weight_error = float(np.sqrt(np.square(off).sum() / whole)) if whole else 0.0
    square, size = weights.square(layer, off), weights.square(layer, weight)
    output_error = None
    if square is not None and size:
        output_error = float(np.sqrt(max(square, 0.0) / size))
    return LayerError(layer.name, layer.shape, bits, weight_error, output_error)
