"""How far onnxruntime's results for one file are from each other: what no other can be nearer to.

Where activations are rounded, the last bit of a float can decide which way a value is rounded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from corpus.oracle import wanted_rows
from slmtvm.verify import Reference

_DRAWS = 4  # of last bits


def own_difference(
    path: Path, sequences: list[np.ndarray], source: np.ndarray | None, *, singly: bool
) -> float:
    """The largest difference, relative to the results' range, between onnxruntime on the file as
    it is and with its graph optimized; where rows can be computed ``singly``, also token by token
    and with last bits of the file's float32 numbers, which then are no scales of activations,
    changed."""
    wanted = np.concatenate(wanted_rows(path, sequences, source, stepwise=False))
    others = (np.concatenate(rows) for rows in _others(path, sequences, source, singly))
    return max(float(np.abs(rows - wanted).max() / np.ptp(wanted)) for rows in others)


def _others(
    path: Path, sequences: list[np.ndarray], source: np.ndarray | None, singly: bool
) -> Iterator[list[np.ndarray]]:
    optimized = Reference(path, optimize=True)
    yield [optimized.rows(tokens, source) for tokens in sequences]
    if not singly:
        return
    yield wanted_rows(path, sequences, source, stepwise=True)
    random = np.random.default_rng(0)
    for _ in range(_DRAWS):
        with tempfile.TemporaryDirectory() as folder:
            for file in path.parent.glob("*.onnx"):  # a decoder's encoder among them
                onnx.save(_with_other_bits(onnx.load(file), random), Path(folder) / file.name)
            yield wanted_rows(Path(folder) / path.name, sequences, source, stepwise=False)


def _with_other_bits(model: onnx.ModelProto, random: np.random.Generator) -> onnx.ModelProto:
    """``model`` with half of the float32 numbers of its weights moved to the next one to zero."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            stay = random.random(array.shape) < 0.5
            moved = np.where(stay, array, np.nextafter(array, np.float32(0)))
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    return model
