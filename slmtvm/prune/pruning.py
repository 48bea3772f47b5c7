"""The public call: a file whose linear layers are pruned, and what that changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto

from slmtvm.errors import SlmError
from slmtvm.ir.model import Structure
from slmtvm.prune import methods
from slmtvm.prune.budget import fewest_dense
from slmtvm.prune.patterns import Pattern, parse_pattern
from slmtvm.prune.report import PrunedLayer, PruneReport
from slmtvm.prune.structured import KINDS, find_structures, inputs_of, prune_inputs, zero_makers
from slmtvm.quantize.accuracy import Accuracy, compare
from slmtvm.quantize.calibration import Tokens, read_tokens, second_moments, write
from slmtvm.quantize.layers import Layer, find_layers, normalise, replace_weight, weight_of
from slmtvm.text import find_tokenizer
from slmtvm.verify.reference import Reference

_MEASURED = 4
"""One of so many windows of the calibration tokens is looked at to measure with alone."""

METHODS = ("sparsegpt", "wanda", "magnitude")

Progress = Callable[[str], None]
Array = npt.NDArray[np.float64]


def prune(
    model: str | Path,
    output: str | Path,
    *,
    pattern: str = "2:4",
    sparsity: float | None = None,
    method: str = "sparsegpt",
    calibration: str | Path | None = None,
    tokenizer: str | Path | None = None,
    exclude: Sequence[str] = (),
    keep_dense: float = 0.0,
    budget: float | None = None,
    head: bool = False,
    structured: str | None = None,
    progress: Progress = lambda _: None,
) -> PruneReport:
    """Write the float file ``model`` with weights of its linear layers set to zero to ``output``.

    Quantize afterwards: zeros stay zeros.

    Parameters
    ----------
    pattern: "n:m" (2:4, 4:8, 1:4), "block:CHANNELSxK" (block:8x4) or "free".
    sparsity: the part of the weights that goes; 0.5 by default, n:m says it itself.
    method: one of METHODS. The first two look at the calibration tokens.
    calibration: a text, or token ids in a .npy file. Perplexities are taken on its last quarter,
        which nothing else looks at where there are 4 windows of 128 tokens.
    tokenizer: for a calibration text; by default the one beside the model.
    exclude: shell patterns of nodes or weights that are left as they are.
    keep_dense: the part of all weights that may stay dense: of the layers that lose most by it.
    budget: instead, the layers that lose most stay dense until the perplexity is at most so many
        times that of before, on the calibration tokens that perplexities are taken on.
    structured: "heads" (with their keys and values, and all query heads that share these) or
        "channels" (of the layers inside of blocks): so many of them go as ``sparsity`` says, and
        ``pattern`` is not looked at. A compiler cuts them out.
    head: also prune the layer that makes the output, which is left as it is otherwise.
    progress: called with the name of each step as it begins.

    Raises SlmError where options contradict each other or a file cannot be used; then no output is
    written.
    """
    source, target = Path(model), Path(output)
    chosen = parse_pattern("free" if structured else pattern, sparsity)
    if structured is not None and structured not in KINDS:
        raise SlmError(f"structured {structured!r}; there are {', '.join(KINDS)}")
    if method not in METHODS:
        raise SlmError(f"method {method!r}; there are {', '.join(METHODS)}")
    if method != "magnitude" and calibration is None:
        raise SlmError(f"method {method!r} needs a calibration text or token ids")
    if not 0 <= keep_dense < 1:
        raise SlmError(f"{keep_dense:g} of the weights to keep dense; it must be in [0, 1)")
    if budget is not None:
        _check_budget(budget, keep_dense, calibration)
    progress("read")
    reference = Reference(source)  # says what is wrong with the file
    proto = onnx.load(str(source))
    normalise(proto)
    layers = every = find_layers(proto, exclude)
    if not head:
        ends = _makers_of_outputs(proto)
        layers = [layer for layer in layers if layer.name not in ends]
    known: Mapping[str, Structure] = {}
    if structured is not None:
        progress(f"find {structured}")
        known = find_structures(proto, structured, source)
        layers = inputs_of(known, layers)
    if not layers:
        raise SlmError("has no linear layer in float that could be pruned", where=str(source))
    windows: list[Tokens] = []
    moments: Mapping[str, npt.NDArray[np.float32]] = {}
    if calibration is not None:
        beside = Path(tokenizer) if tokenizer else find_tokenizer(source)
        windows = read_tokens(Path(calibration), beside)
        apart = len(windows) // _MEASURED
        seen, windows = windows[: len(windows) - apart], windows[-apart:] if apart else windows
        progress("calibrate")
        moments = second_moments(proto, [layer.x for layer in layers], seen)
    progress(method)
    # Layers that share a weight are pruned once, for the inputs of all of them.
    how = partial(_prune, proto, moments=moments, method=method, pattern=chosen)
    found = {
        weight: how(sharing, structure=known.get(weight), sparsity=sparsity)
        for weight, sharing in _by_weight(layers).items()
    }
    rows = [_row(proto, layer, found[layer.weight], moments) for layer in layers]
    dense = _dearest(rows, layers, keep_dense)

    def put(into: ModelProto, left: Collection[str]) -> ModelProto:
        for layer in layers:
            if layer.weight not in left:
                replace_weight(into, layer, found[layer.weight].T.astype(np.float32))
                if layer.weight in known:
                    zero_makers(into, every, known[layer.weight], found[layer.weight])
        return into

    def cost(left: Collection[str]) -> Accuracy:
        tried = ModelProto()
        tried.CopyFrom(proto)
        return compare(reference, put(tried, left), windows)

    accuracy = Accuracy()
    if budget is not None:
        progress("budget")
        dense, accuracy = fewest_dense(_by_loss(rows, layers), cost, budget)
    put(proto, dense)
    rows = [_left_dense(row) if layer.weight in dense else row
            for row, layer in zip(rows, layers, strict=True)]  # fmt: skip
    if windows and budget is None:
        progress("compare")
        accuracy = compare(reference, proto, windows)
    write(proto, target)
    return PruneReport(target, structured or pattern, method, tuple(rows), accuracy)


def _makers_of_outputs(model: ModelProto) -> set[str]:
    """The nodes that make an output of the file, or one that nothing but a bias comes after."""
    ends = {output.name for output in model.graph.output}
    ends |= {name for node in model.graph.node if node.op_type in ("Add", "Cast")
             and ends.intersection(node.output) for name in node.input}  # fmt: skip
    return {node.name for node in model.graph.node if ends.intersection(node.output)}


def _by_weight(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    found: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        found[layer.weight].append(layer)
    return found


def _prune(
    model: ModelProto,
    sharing: Sequence[Layer],
    *,
    moments: Mapping[str, npt.NDArray[np.float32]],
    pattern: Pattern,
    method: str,
    structure: Structure | None,
    sparsity: float | None,
) -> Array:
    """The pruned weight (n, k) of layers that share one."""
    weight = weight_of(model, sharing[0]).T.astype(np.float64)
    moment = None
    if method != "magnitude":
        moment = np.mean([moments[layer.x].astype(np.float64) for layer in sharing], axis=0)
    if structure is not None:
        part = 0.5 if sparsity is None else sparsity
        return prune_inputs(weight, moment, structure.unit, part, method)
    if moment is None:
        return methods.magnitude(weight, pattern)
    how = methods.wanda if method == "wanda" else methods.sparsegpt
    return how(weight, moment, pattern)


def _row(
    model: ModelProto,
    layer: Layer,
    pruned: Array,
    moments: Mapping[str, npt.NDArray[np.float32]],
) -> PrunedLayer:
    weight = weight_of(model, layer).T.astype(np.float64)
    off = pruned - weight
    output_error = None
    if layer.x in moments:
        moment = moments[layer.x].astype(np.float64)
        output_error = _ratio(_square(off, moment), _square(weight, moment))
    return PrunedLayer(
        layer.name,
        layer.shape,
        float((pruned == 0).mean()),
        _ratio(float(np.square(off).sum()), float(np.square(weight).sum())),
        output_error,
    )


def _square(weight: Array, moment: Array) -> float:
    """The mean square of a row's outputs, summed over them."""
    return max(float(np.einsum("nk,nk->", weight @ moment, weight)), 0.0)


def _ratio(square: float, whole: float) -> float:
    return float(np.sqrt(square / whole)) if whole else 0.0


def _by_loss(rows: Sequence[PrunedLayer], layers: Sequence[Layer]) -> list[str]:
    """The weights, from the one whose layer loses most on."""

    def loss(index: int) -> float:
        error = rows[index].output_error
        return rows[index].weight_error if error is None else error

    order = sorted(range(len(rows)), key=loss, reverse=True)
    return list(dict.fromkeys(layers[index].weight for index in order))


def _dearest(rows: Sequence[PrunedLayer], layers: Sequence[Layer], part: float) -> frozenset[str]:
    """The weights that stay dense: of those whose layers lose most, as many as ``part`` allows."""
    sizes = {layer.weight: row.shape[0] * row.shape[1]
             for row, layer in zip(rows, layers, strict=True)}  # fmt: skip
    left = part * sum(row.shape[0] * row.shape[1] for row in rows)
    kept: set[str] = set()
    for weight in _by_loss(rows, layers):
        if sizes[weight] <= left:
            kept.add(weight)
            left -= sizes[weight]
    return frozenset(kept)


def _check_budget(budget: float, keep_dense: float, calibration: str | Path | None) -> None:
    if not budget >= 1:
        raise SlmError(f"a budget of {budget:g} times the perplexity; it must be at least 1")
    if keep_dense:
        raise SlmError("a budget says how many layers stay dense: leave --keep-dense out")
    if calibration is None:
        raise SlmError("a budget is of perplexity: give a text with --calibration")


def _left_dense(row: PrunedLayer) -> PrunedLayer:
    none = None if row.output_error is None else 0.0
    return replace(row, zeros=0.0, weight_error=0.0, output_error=none, dense=True)
