"""When two models' outputs count as the same: figures of a difference, and their limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

SAME = 1.01  # times a difference: the same rounding turned, by other floats around it


@dataclass(frozen=True)
class Limits:
    """How far an output may be from onnxruntime's; the defaults are what ``compile`` allows.

    max_kl: mean KL divergence of logits, nats. min_cosine: mean cosine between rows, of logits as
    of hidden states: it also tells models apart whose probabilities are nearly uniform.
    max_relative: largest difference over the range of onnxruntime's values: a fault in few rows.
    """

    max_kl: float = 0.01
    min_cosine: float = 0.99
    max_relative: float = 0.2


@dataclass(frozen=True)
class Figures:
    """How far rows (n, features) of one output are from those of a reference.

    ``relative`` is the largest difference over the range of the reference's values, ``cosine`` the
    mean between rows, of logits without each row's mean. ``kl_mean`` (nats, KL(reference || ours))
    and ``top1`` (fraction of rows with the same largest value) are of logits alone, None else.
    """

    tokens: int
    max_abs: float
    mean_abs: float
    relative: float
    cosine: float
    kl_mean: float | None = None
    top1: float | None = None

    def excess(self, limits: Limits, own: Figures | None = None) -> list[str]:
        """What is beyond both its limit and ``own``, onnxruntime's difference from itself.

        A sentence's part for each measure; nothing where the outputs agree. NaN is beyond all.
        """
        kl = own.kl_mean if own and own.kl_mean is not None else 0.0
        found = []
        if self.kl_mean is not None:
            most = max(limits.max_kl, kl * SAME)
            if not self.kl_mean <= most:
                found.append(f"KL divergence {self.kl_mean:.2g} nats (at most {most:.2g})")
        least = min(limits.min_cosine, 1 - (1 - own.cosine) * SAME if own else 1.0)
        if not self.cosine >= least:
            found.append(f"cosine {self.cosine:.4f} (at least {least:.4f})")
        most = max(limits.max_relative, own.relative * SAME if own else 0.0)
        if not self.relative <= most:
            found.append(
                f"largest difference {self.relative:.2g} of the range (at most {most:.2g})"
            )
        return found

    @property
    def is_finite(self) -> bool:
        """Whether every figure is a number."""
        return all(math.isfinite(x) for x in asdict(self).values() if isinstance(x, float))

    def to_json(self) -> dict[str, Any]:
        """Its numbers by name; None where there is none, or it is not finite."""
        return {key: finite(value) for key, value in asdict(self).items()}


def worst(figures: Sequence[Figures]) -> Figures:
    """The largest of every difference."""
    divergences = [f.kl_mean for f in figures if f.kl_mean is not None]
    shares = [f.top1 for f in figures if f.top1 is not None]
    return Figures(
        tokens=max(f.tokens for f in figures),
        max_abs=max(f.max_abs for f in figures),
        mean_abs=max(f.mean_abs for f in figures),
        relative=max(f.relative for f in figures),
        cosine=min(f.cosine for f in figures),
        kl_mean=max(divergences) if divergences else None,
        top1=min(shares) if shares else None,
    )


def finite(value: Any) -> Any:
    """``value``, None in the place of a float that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
