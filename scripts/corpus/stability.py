"""How far onnxruntime's results for one file are from each other: what no other can be nearer to.

Where activations are rounded, the last bit of a float can decide which way a value is rounded; if
all rows of a call are rounded by one scale, what comes later can.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx

from corpus.agreement import Rule, largest_difference
from corpus.oracle import Calls, wanted_rows
from corpus.outputs import side_by_side, their_rows
from slmtvm.errors import SlmError
from slmtvm.ir.model import Output
from slmtvm.verify import Reference
from slmtvm.verify.stability import with_other_bits

_DRAWS = 64  # of last bits, or of what comes later: a turned rounding is rare


def own_difference(
    path: Path,
    sequences: list[np.ndarray],
    source: np.ndarray | None,
    outputs: Sequence[Output],
    rule: Rule,
    scores_last: bool = False,
) -> float:
    """The largest difference, relative to the results' range, between onnxruntime on the file as
    it is and with its graph optimized, and with last bits of the file's float32 numbers changed,
    but for single ones, such as scales of activations; where a single row's results are to be
    relied on, also token by token; and where a decoder without a cache rounds all rows of a call
    together, with other tokens after those of a sequence, or, where only its last one is scored
    (``scores_last``), beside those of another sequence in a batch."""
    wanted = wanted_rows(path, sequences, source, outputs, stepwise=False)
    others = _others(path, sequences, source, outputs, rule, scores_last)
    return max((largest_difference(rows, wanted, outputs) for rows in others), default=0.0)


def optimized_reference(path: Path) -> Reference | None:
    """onnxruntime with the file's graph optimized; None where it then does not run the file.

    Asked for sums of unsigned bytes, which alone are exact on every CPU, onnxruntime 1.32 names two
    constants alike where products share their weights (ALBERT's layers).
    """
    try:
        return Reference(path, optimize=True)
    except SlmError:
        return None


def _others(
    path: Path,
    sequences: list[np.ndarray],
    source: np.ndarray | None,
    outputs: Sequence[Output],
    rule: Rule,
    scores_last: bool,
) -> Iterator[list[np.ndarray]]:
    if (optimized := optimized_reference(path)) is not None:
        yield [their_rows(optimized, tokens, source, outputs) for tokens in sequences]
    if rule.single is not None:
        yield wanted_rows(path, sequences, source, outputs, stepwise=True)
    random = np.random.default_rng(0)
    for _ in range(_DRAWS):
        with tempfile.TemporaryDirectory() as folder:
            for file in path.parent.glob("*.onnx"):  # a decoder's encoder among them
                onnx.save(with_other_bits(onnx.load(file), random), Path(folder) / file.name)
            yield wanted_rows(Path(folder) / path.name, sequences, source, outputs, stepwise=False)
    reference = Reference(path)
    if any(output.pooled for output in outputs):
        calls = Calls(path)
        for _ in range(_DRAWS * (rule.stepwise and scores_last)):
            yield [
                side_by_side(outputs, calls.beside(tokens, random.permutation(tokens), outputs), 1)
                for tokens in sequences
            ]
        return
    if rule.stepwise and reference.is_decoder and source is None and not Calls(path).has_cache:
        for _ in range(_DRAWS):
            yield [_rows_before_others(reference, tokens, random) for tokens in sequences]


def _rows_before_others(
    reference: Reference, tokens: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """The rows of tokens (n,) in a call that goes on with up to n of them in another order."""
    after = random.permutation(tokens)[: random.integers(1, len(tokens) + 1)]
    return reference.rows(np.concatenate([tokens, after]))[: len(tokens)]
