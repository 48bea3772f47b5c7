"""Whole heads and channels that go: zero in what reads them and in what makes them.

A compiler cuts such zeros out, see ``importer.emit.cut_zeros``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, numpy_helper

from slmtvm.errors import SlmError
from slmtvm.importer import import_onnx
from slmtvm.ir.model import Structure
from slmtvm.prune.patterns import largest
from slmtvm.quantize.calibration import write
from slmtvm.quantize.layers import Layer

KINDS = ("heads", "channels")

Array = npt.NDArray[np.float64]

_DAMPING = 0.01  # of the mean square of an input, for the moments to have an inverse


def find_structures(model: ModelProto, kind: str, source: Path) -> dict[str, Structure]:
    """The layers whose inputs are of this ``kind``, one of KINDS, by the names of their weights.

    Raises SlmError where ``model`` has none that can go together with what makes them.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write(model, path)
        found = import_onnx(path).structures
    structures = {s.reader: s for s in found if s.kind == kind}
    if not structures:
        raise SlmError(f"has no {kind} that can be left out as a whole", where=str(source))
    return structures


def prune_inputs(
    weight: Array, moment: Array | None, unit: int, sparsity: float, method: str
) -> Array:
    """``weight`` (n, k) without the units of inputs that lose least; ``moment`` (k, k) as in
    ``methods``, needed but by "magnitude".

    With "sparsegpt" the loss is what is left once the other weights have made up for it, as well
    as least squares can, and they do.
    """
    k = weight.shape[1]
    if method == "magnitude" or moment is None:
        losses = np.square(weight).sum(axis=0).reshape(-1, unit).sum(axis=1)
    elif method == "wanda":
        by_input = np.square(weight).sum(axis=0) * np.diag(moment)
        losses = by_input.reshape(-1, unit).sum(axis=1)
    else:
        whole = _damped(moment)
        inverse = np.linalg.inv(whole)
        parts = [slice(begin, begin + unit) for begin in range(0, k, unit)]
        losses = np.array(
            [
                np.einsum("nk,kj,nj->", weight[:, p], np.linalg.inv(inverse[p, p]), weight[:, p])
                for p in parts
            ]
        )
    stays = largest(losses, min(sparsity, 1 - 1 / len(losses)))
    kept = np.repeat(stays, unit)
    pruned = np.where(kept, weight, 0.0)
    if method == "sparsegpt" and moment is not None:
        whole = _damped(moment)
        solved = np.linalg.solve(whole[np.ix_(kept, kept)], whole[kept] @ weight.T)
        pruned[:, kept] = solved.T
    return pruned


def zero_makers(
    model: ModelProto, layers: Sequence[Layer], structure: Structure, pruned: Array
) -> None:
    """Set to zero, in place, what makes those inputs of ``structure`` that ``pruned`` (n, k) leaves
    out."""
    gone = (pruned == 0).all(axis=0).reshape(-1, structure.unit).all(axis=1)
    weights = {layer.weight for layer in layers}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for weight, begin, outputs, bias in structure.makers:
        if weight not in weights or (bias and bias not in tensors):
            continue  # readers weigh them with 0, which is enough for floats
        places = begin + np.flatnonzero(np.repeat(gone, outputs))
        for name in (weight, bias) if bias else (weight,):
            value = numpy_helper.to_array(tensors[name]).copy()
            value[..., places] = 0
            tensors[name].CopyFrom(numpy_helper.from_array(value, name))


def _damped(moment: Array) -> Array:
    size = float(np.diag(moment).mean()) or 1.0
    return np.asarray(moment + _DAMPING * size * np.eye(len(moment)))


def inputs_of(structures: Mapping[str, Structure], layers: Sequence[Layer]) -> list[Layer]:
    """Those of ``layers`` that read what can go."""
    return [layer for layer in layers if layer.weight in structures]
