"""How far two models' outputs are apart, summed up batch by batch in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Rows that are turned to float64 at a time: a vocabulary of 150,000 then takes some 100 MB.
_ROWS = 32


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities, float64, over the last axis of logits (n, vocab)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


@dataclass
class Difference:
    """Sums of absolute differences over all rows seen so far."""

    max_abs: float = 0.0
    sum_abs: float = 0.0
    values: int = 0
    rows: int = 0

    def add(self, ours: np.ndarray, reference: np.ndarray) -> None:
        """Take in float32 (n, features) of each."""
        difference = np.abs(ours.astype(np.float64) - reference)
        self.max_abs = max(self.max_abs, float(difference.max()))
        self.sum_abs += float(difference.sum())
        self.values += difference.size
        self.rows += len(difference)

    @property
    def mean_abs(self) -> float:
        return self.sum_abs / self.values


@dataclass
class LogitsDifference(Difference):
    """The same for logits, and what is left of it in probabilities.

    kl: KL(reference || ours) in nats; nll: negative log likelihood of the tokens that follow.
    """

    sum_kl: float = 0.0
    same_top1: int = 0
    nll: float = 0.0
    nll_reference: float = 0.0

    def add_logits(self, ours: np.ndarray, reference: np.ndarray, targets: np.ndarray) -> None:
        """Take in float32 (n, vocab) of each and the tokens (n,) that follow."""
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            self._add_rows(ours[rows], reference[rows], targets[rows])

    def _add_rows(self, ours: np.ndarray, reference: np.ndarray, targets: np.ndarray) -> None:
        self.add(ours, reference)
        p, q = log_softmax(reference), log_softmax(ours)
        self.sum_kl += float((np.exp(p) * (p - q)).sum())
        self.same_top1 += int((ours.argmax(-1) == reference.argmax(-1)).sum())
        at = np.arange(len(targets)), targets
        self.nll -= float(q[at].sum())
        self.nll_reference -= float(p[at].sum())


@dataclass
class HiddenDifference(Difference):
    """The same for an encoder's hidden states, and the cosine between rows."""

    sum_cosine: float = 0.0

    def add_hidden(self, ours: np.ndarray, reference: np.ndarray) -> None:
        """Take in float32 (n, hidden) of each."""
        self.add(ours, reference)
        a, b = ours.astype(np.float64), reference.astype(np.float64)
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        self.sum_cosine += float(((a * b).sum(-1) / norms).sum())
