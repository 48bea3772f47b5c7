"""All outputs of a model in one matrix of rows, ours and onnxruntime's, to be compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from corpus.inputs import source_of
from slmtvm.ir.model import CanonicalModel, Output
from slmtvm.ir.reference import evaluate_outputs
from slmtvm.verify import Reference


def side_by_side(outputs: Sequence[Output], values: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Outputs of one sequence of ``count`` tokens as float32 (n, features): those of tokens next
    to each other, and what is pooled in every row; one row where all is pooled.

    ``compare`` takes them apart again.
    """
    rows = 1 if all(output.pooled for output in outputs) else count
    parts = []
    for output, value in zip(outputs, values, strict=True):
        part = np.reshape(value, (1 if output.pooled else count, output.features))
        parts.append(np.broadcast_to(part, (rows, output.features)))
    return np.concatenate(parts, axis=1).astype(np.float32)


def our_rows(model: CanonicalModel, tokens: np.ndarray) -> np.ndarray:
    """What the model's ops compute of tokens (n,), after its source if it has one."""
    values = evaluate_outputs(model, tokens, source_of(model.kind))
    if model.kind != "encoder":  # what is pooled of a decoder is that of its last token
        pairs = zip(model.outputs, values, strict=True)
        values = [value[-1] if output.pooled else value for output, value in pairs]
    return side_by_side(model.outputs, values, len(tokens))


def their_rows(
    reference: Reference, tokens: np.ndarray, source: np.ndarray | None, outputs: Sequence[Output]
) -> np.ndarray:
    """What onnxruntime computes of the same outputs."""
    values = reference.run(tokens, [output.name for output in outputs], source)
    return side_by_side(outputs, values, len(tokens))
