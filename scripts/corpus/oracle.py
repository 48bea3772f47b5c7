"""onnxruntime on a file, all tokens at once or one after the other through the file's own cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from slmtvm.verify.reference import Reference


def wanted_rows(
    path: Path, sequences: list[np.ndarray], source: np.ndarray | None = None, *, stepwise: bool
) -> list[np.ndarray]:
    """The rows float32 (n, features) of each sequence of tokens (n,), after a source (s,) if any.

    ``stepwise``: token by token where the file takes a past. Dynamic quantization gives all rows of
    a call one scale, so that only this way the rows do not depend on what comes after them.
    """
    reference = Reference(path)
    stepwise = stepwise and source is None
    if not stepwise or not any(n.startswith("past") for n in reference.feeds([0])):
        return [reference.rows(tokens, source) for tokens in sequences]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [_steps(session, reference, tokens) for tokens in sequences]


def _steps(
    session: onnxruntime.InferenceSession, reference: Reference, tokens: np.ndarray
) -> np.ndarray:
    outputs = [output.name for output in session.get_outputs()]
    rows, past = [], {}
    for position, token in enumerate(tokens):
        feeds = {**reference.feeds([token]), **past}
        if "attention_mask" in feeds:
            feeds["attention_mask"] = np.ones((1, position + 1), feeds["attention_mask"].dtype)
        if "position_ids" in feeds:
            feeds["position_ids"] = np.full_like(feeds["position_ids"], position)
        values = dict(zip(outputs, session.run(None, feeds), strict=True))
        rows.append(np.asarray(values["logits"], np.float32)[0])
        caches = [name for name in feeds if name.startswith("past")]
        past = {name: values[_present(name, values)] for name in caches}
    return np.concatenate(rows)


def _present(past: str, values: dict[str, np.ndarray]) -> str:
    """The output that is a past input's next value."""
    layer = past.split(".", 1)[1]
    return next(name for name in values if name.startswith("present") and name.endswith(layer))
