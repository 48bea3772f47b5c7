"""How far a file's outputs are from those of the file that it was made from."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto

from slmtvm.quantize.calibration import Tokens, save
from slmtvm.verify.metrics import HiddenDifference, LogitsDifference
from slmtvm.verify.reference import Reference


@dataclass(frozen=True)
class Accuracy:
    """On so many ``tokens``: a decoder's perplexities and the mean KL divergence (before || after)
    in nats, or the cosine of an encoder's hidden states; None where they have no meaning."""

    tokens: int = 0
    ppl_before: float | None = None
    ppl_after: float | None = None
    kl: float | None = None
    cosine: float | None = None


def compare(before: Reference, after: ModelProto, windows: Sequence[Tokens]) -> Accuracy:
    """Both under onnxruntime on ``windows`` of tokens, each on its own."""
    logits, hidden = LogitsDifference(), HiddenDifference()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "after.onnx"
        save(after, path)
        changed = Reference(path)
        for window in windows:
            theirs, ours = (_rows(file.main(window)) for file in (before, changed))
            if before.is_decoder and _scores_tokens(theirs, window):
                logits.add_logits(ours[:-1], theirs[:-1], window[1:])
            else:
                hidden.add_hidden(ours, theirs)
    if not logits.rows:
        return Accuracy(tokens=hidden.rows, cosine=hidden.cosine)
    return Accuracy(
        tokens=logits.rows,
        ppl_before=float(np.exp(logits.nll_reference / logits.rows)),
        ppl_after=float(np.exp(logits.nll / logits.rows)),
        kl=logits.sum_kl / logits.rows,
    )


def _rows(output: np.ndarray) -> np.ndarray:
    """An output of one sequence as float32 (n, features): numbers without features are one row."""
    return np.asarray(output, np.float32).reshape(-1, output.shape[-1])


def _scores_tokens(rows: np.ndarray, window: Tokens) -> bool:
    """Whether each token of a window has a number for every token, and not one for each label."""
    return len(rows) == len(window) and rows.shape[1] > int(np.max(window))
