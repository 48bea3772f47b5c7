"""How to choose what goes: by size, by size times activations (Wanda, arXiv:2306.11695), or by what
is lost once the others have made up for it (SparseGPT, arXiv:2301.00774).

Weights here are (n, k) float64; ``moment`` is the mean of ``x x^T`` over rows x of the layer's
input, (k, k).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from slmtvm.prune.patterns import Pattern

Array = npt.NDArray[np.float64]

_TOGETHER = 64  # values of k whose masks are chosen, and whose errors are passed on, at a time
_DAMPING = 0.01  # of the mean square of an input: for the moments to have an inverse


def magnitude(weight: Array, pattern: Pattern) -> Array:
    """``weight`` without its smallest."""
    return _kept(weight, np.abs(weight), pattern)


def wanda(weight: Array, moment: Array, pattern: Pattern) -> Array:
    """``weight`` without those whose products are smallest."""
    return _kept(weight, np.abs(weight) * np.sqrt(np.diag(moment)), pattern)


def sparsegpt(weight: Array, moment: Array, pattern: Pattern) -> Array:
    """``weight`` without those whose loss is smallest, the others changed to make up for it.

    Values of k are settled in order: what a row loses there is taken over by its later ones, as the
    inverse of the moments says.
    """
    step = pattern.step
    w, k = _padded(weight, step), weight.shape[1]
    upper = _inverse_root(moment, w.shape[1])
    diagonal = np.diag(upper)
    together = max(step, _TOGETHER // step * step)
    for start in range(0, w.shape[1], together):
        end = min(start + together, w.shape[1])
        stays = np.zeros((len(w), end - start), np.bool_)
        errors = np.zeros((len(w), end - start))
        # n:m choose as late as they can, when earlier ones have passed on their errors.
        size = step if step > 1 and pattern.late else end - start
        for j in range(start, end):
            if (j - start) % size == 0:
                part = slice(j, j + size)
                loss = np.square(w[:, part] / diagonal[part])
                stays[:, j - start : j - start + size] = pattern.keep(loss)
            settled = np.where(stays[:, j - start], w[:, j], 0.0)
            error = (w[:, j] - settled) / upper[j, j]
            w[:, j:end] -= np.outer(error, upper[j, j:end])
            w[:, j] = settled
            errors[:, j - start] = error
        w[:, end:] -= errors @ upper[start:end, end:]
    return w[:, :k]


def _kept(weight: Array, scores: Array, pattern: Pattern) -> Array:
    stays = pattern.keep(_padded(scores, pattern.step))[:, : weight.shape[1]]
    return np.where(stays, weight, 0.0)


def _padded(values: Array, step: int) -> Array:
    """A copy, with zeros up to a multiple of ``step`` along k."""
    return np.pad(values, ((0, 0), (0, -values.shape[1] % step)))


def _inverse_root(moment: Array, k: int) -> Array:
    """The upper triangle U with ``U^T U`` the inverse of the damped moments, (k, k)."""
    damping = _DAMPING * float(np.diag(moment).mean()) or 1.0
    whole = np.eye(k) * damping
    size = len(moment)
    whole[:size, :size] += moment
    return np.asarray(np.linalg.cholesky(np.linalg.inv(whole)).T)
