"""The cost model: gradient-boosted trees from a setting's features to its speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slmtvm.errors import SlmError

_PARAMETERS = {
    "max_depth": 6, "eta": 0.2, "min_child_weight": 1, "nthread": 1, "seed": 0,
    "objective": "reg:squarederror", "verbosity": 0,
}  # fmt: skip
_TREES = 60
FAILED = 3.0
"""A setting that fails counts as so many times as slow as the default."""


def import_xgboost() -> Any:
    """The module; SlmError, naming the extra, where it is not installed."""
    try:
        import xgboost
    except ImportError as error:
        raise SlmError(
            "tuning needs xgboost, which is not installed: pip install 'slmtvm[tune]'"
        ) from error
    return xgboost


class CostModel:
    """Predicts the logarithm of how much faster a setting is than its task's default.

    One model for all tasks of a kind: what was learnt of one shape is known of the next.
    """

    def __init__(self) -> None:
        self._xgboost = import_xgboost()
        self._rows: list[np.ndarray] = []
        self._speeds: list[float] = []
        self._weights: list[float] = []
        self._booster: Any = None

    def add(self, row: np.ndarray, ratio: float, weight: float = 1.0) -> None:
        """A setting of these features takes ``ratio`` of the default's time; infinite: it fails.

        ``weight``: less than 1 for what was measured elsewhere.
        """
        self._rows.append(row)
        self._speeds.append(-float(np.log(min(ratio, FAILED))))
        self._weights.append(weight)
        self._booster = None

    def predict(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """float (len(rows),): -log(ratio), zeros while nothing is known."""
        # One thread everywhere: more would spin for each other beside what is measured.
        if not self._rows:
            return np.zeros(len(rows))
        if self._booster is None:
            data = self._xgboost.DMatrix(
                np.stack(self._rows), np.array(self._speeds), weight=np.array(self._weights),
                nthread=1,
            )  # fmt: skip
            self._booster = self._xgboost.train(_PARAMETERS, data, _TREES)
        predicted = self._booster.predict(self._xgboost.DMatrix(np.stack(rows), nthread=1))
        return np.asarray(predicted, float)
