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
        mask: str = "none",
        distort: Distortion = lambda rows: rows,
    ) -> None:
        self.info: dict[str, Any] = {
            "kind": kind, "context": context, "vocab_size": vocab_size, "mask": mask,
        }  # fmt: skip
        self._reference = reference
        self._distort = distort
        self._tokens: list[int] = []

    def reset(self) -> None:
        self._tokens = []

    def eval_all(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        if mask is not None:  # of all tokens: nothing came before
            assert not self._tokens
            return self._distort(self._masked(tokens, mask))
        start = len(self._tokens)
        self._tokens.extend(int(token) for token in tokens)
        return self._distort(self._reference.rows(self._tokens)[start:])

    def eval(self, tokens: np.ndarray) -> np.ndarray:
        return self.eval_all(tokens)[-1]

    def encode(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        return self._distort(self._masked(tokens, mask))

    def _masked(self, tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        rows = self._reference.rows(tokens, mask=mask)
        return rows if mask is None else rows * mask[:, None]
