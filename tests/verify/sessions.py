"""Sessions that are no compiled model: onnxruntime itself, exact or with a known error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from slmtvm.verify import Reference

Distortion = Callable[[np.ndarray], np.ndarray]


class ReferenceSession:
    """A Reference behind a session's interface; ``distort`` is applied to all that comes out."""

    def __init__(
        self,
        reference: Reference,
        *,
        vocab_size: int = 4096,
        kind: str = "decoder",
        context: int = 1024,
        distort: Distortion = lambda rows: rows,
    ) -> None:
        self.info: dict[str, Any] = {"kind": kind, "context": context, "vocab_size": vocab_size}
        self._reference = reference
        self._distort = distort
        self._tokens: list[int] = []

    def reset(self) -> None:
        self._tokens = []

    def eval_all(self, tokens: np.ndarray) -> np.ndarray:
        start = len(self._tokens)
        self._tokens.extend(int(token) for token in tokens)
        return self._distort(self._reference.rows(self._tokens)[start:])

    def eval(self, tokens: np.ndarray) -> np.ndarray:
        return self.eval_all(tokens)[-1]

    def encode(self, tokens: np.ndarray) -> np.ndarray:
        return self._distort(self._reference.rows(tokens))
