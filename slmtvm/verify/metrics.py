"""How far two models' outputs are apart, summed up batch by batch in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slmtvm.verify.agreement import Figures

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
    """Sums of absolute differences over all rows seen so far, and of the cosine between rows."""

    max_abs: float = 0.0
    sum_abs: float = 0.0
    sum_cosine: float = 0.0
    values: int = 0
    rows: int = 0
    least: float = np.inf  # of the reference's values
    most: float = -np.inf

    def add(self, ours: np.ndarray, reference: np.ndarray) -> None:
        """Take in float64 (n, features) of each."""
        difference = np.abs(ours - reference)
        # max() of Python drops what is not a number where it comes second.
        self.max_abs = float(np.maximum(self.max_abs, difference.max()))
        self.sum_abs += float(difference.sum())
        self.values += difference.size
        self.rows += len(difference)
        self.least = float(np.minimum(self.least, reference.min()))
        self.most = float(np.maximum(self.most, reference.max()))

    def add_cosines(self, a: np.ndarray, b: np.ndarray) -> None:
        """Take in float64 (n, features) of each."""
        products = (a * b).sum(-1)
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        # Rows of zeros have no direction, and agree with one another.
        both = ~(a.any(-1) | b.any(-1))
        cosines = np.divide(products, norms, out=np.zeros(len(a)), where=norms != 0)
        self.sum_cosine += float(np.where(both, 1.0, cosines).sum())

    @property
    def mean_abs(self) -> float:
        return self.sum_abs / self.values

    @property
    def relative(self) -> float:
        """The largest difference over the range of the reference's values."""
        span = self.most - self.least
        if self.max_abs == 0 or span == 0:
            return 0.0 if self.max_abs == 0 else np.inf
        return self.max_abs / span

    @property
    def cosine(self) -> float:
        return self.sum_cosine / self.rows


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
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is seen in numbers
            p, q = log_softmax(reference), log_softmax(ours)
            possible = p != -np.inf  # what has no probability adds none
            lost = np.subtract(p, q, out=np.zeros(p.shape), where=possible)
            self.sum_kl += float((np.exp(p) * lost).sum())
            self.same_top1 += int((ours.argmax(-1) == reference.argmax(-1)).sum())
            at = np.arange(len(targets)), targets
            self.nll -= float(q[at].sum())
            self.nll_reference -= float(p[at].sum())
            a, b = _without_shared_infinities(ours, reference)
            self.add(a, b)
            # A number that is added to all logits of a row changes no probability.
            self.add_cosines(*(x - x.mean(-1, keepdims=True) for x in (a, b)))

    def figures(self) -> Figures:
        """What was taken in so far."""
        return Figures(
            tokens=self.rows,
            max_abs=self.max_abs,
            mean_abs=self.mean_abs,
            relative=self.relative,
            cosine=self.cosine,
            kl_mean=self.sum_kl / self.rows,
            top1=self.same_top1 / self.rows,
        )


@dataclass
class HiddenDifference(Difference):
    """The same for an encoder's hidden states."""

    def add_hidden(self, ours: np.ndarray, reference: np.ndarray) -> None:
        """Take in float32 (n, hidden) of each."""
        with np.errstate(invalid="ignore", over="ignore"):
            a, b = _without_shared_infinities(ours, reference)
            self.add(a, b)
            self.add_cosines(a, b)

    def figures(self) -> Figures:
        """What was taken in so far."""
        return Figures(
            tokens=self.rows,
            max_abs=self.max_abs,
            mean_abs=self.mean_abs,
            relative=self.relative,
            cosine=self.cosine,
        )


def _without_shared_infinities(ours: np.ndarray, reference: np.ndarray) -> list[np.ndarray]:
    """Both in float64; 0 where both have the same infinity, as what a mask leaves out has."""
    shared = (ours == reference) & np.isinf(reference)
    return [np.where(shared, 0.0, x.astype(np.float64)) for x in (ours, reference)]
