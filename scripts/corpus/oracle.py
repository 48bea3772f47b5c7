"""onnxruntime on a file, all tokens at once or call by call through the file's own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from corpus.outputs import their_rows
from slmtvm.ir.model import Output
from slmtvm.verify.exact_sums import exact_session
from slmtvm.verify.reference import Reference


def wanted_rows(
    path: Path,
    sequences: list[np.ndarray],
    source: np.ndarray | None = None,
    outputs: Sequence[Output] = (),
    *,
    stepwise: bool,
) -> list[np.ndarray]:
    """The rows float32 (n, features) of each sequence of tokens (n,), after a source (s,) if any.

    ``outputs``: those that stand side by side in the rows; without any the file's main one.
    ``stepwise``: token by token where the file takes a past. Dynamic quantization gives all rows of
    a call one scale, so that only this way the rows do not depend on what comes after them.
    """
    calls = Calls(path) if stepwise and source is None else None
    if calls is None or not calls.has_cache:
        reference = Reference(path)
        if not outputs or (reference.fixed_length and len(outputs) == 1):
            return [reference.rows(tokens, source) for tokens in sequences]
        return [their_rows(reference, tokens, source, outputs) for tokens in sequences]
    rows = []
    for tokens in sequences:
        calls.reset()
        rows.append(np.concatenate([calls.rows(token[None]) for token in tokens]))
    return rows


class Calls:
    """A file under onnxruntime: each call's keys and values are the past of the next."""

    def __init__(self, path: Path) -> None:
        self._reference = Reference(path)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = exact_session(path, options)
        self._caches = [i.name for i in self._session.get_inputs() if i.name.startswith("past")]
        self.reset()

    @property
    def has_cache(self) -> bool:
        """Whether the file takes a past."""
        return bool(self._caches)

    def reset(self) -> None:
        """Begin another sequence."""
        self._past: dict[str, np.ndarray] = {}
        self._position = 0

    def feeds(self, tokens: np.ndarray, source: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The values of all inputs for the next tokens (n,)."""
        feeds = {**self._reference.feeds(tokens, source), **self._past}
        if self._position and "attention_mask" in feeds:
            shape = (1, self._position + len(tokens))
            feeds["attention_mask"] = np.ones(shape, feeds["attention_mask"].dtype)
        if "position_ids" in feeds:
            feeds["position_ids"] += feeds["position_ids"].dtype.type(self._position)
        if "use_cache_branch" in feeds:
            feeds["use_cache_branch"] |= self._position > 0
        return feeds

    def beside(
        self, tokens: np.ndarray, others: np.ndarray, outputs: Sequence[Output]
    ) -> list[np.ndarray]:
        """Outputs for tokens (n,) in a batch with other ones (n,), without a past."""
        both = [self._reference.feeds(row) for row in (tokens, others)]
        feeds = {name: np.concatenate([feed[name] for feed in both]) for name in both[0]}
        values = self._session.run([output.name for output in outputs], feeds)
        return [np.asarray(value)[:1] for value in values]

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """The logits float32 (n, vocab) of the next tokens (n,), which the cache takes in."""
        names = [output.name for output in self._session.get_outputs()]
        values = dict(zip(names, self._session.run(None, self.feeds(tokens)), strict=True))
        self._past = {name: values[_present(name, names)] for name in self._caches}
        self._position += len(tokens)
        return np.asarray(values["logits"], np.float32)[0]


def _present(past: str, outputs: list[str]) -> str:
    """The output that is a past input's next value."""
    layer = past.split(".", 1)[1]
    return next(name for name in outputs if name.startswith("present") and name.endswith(layer))
