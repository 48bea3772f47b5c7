"""What a sentence-transformer's modules make of rows of tokens, by their formulas in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from slmtvm.embedding_modules import LayerNorm, Modules

_LEAST_LENGTH = 1e-12  # that an embedding is divided by, as torch has it

Array = npt.NDArray[np.float64]
_erf = np.vectorize(math.erf, otypes=[np.float64])
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "GELU": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def embed(modules: Modules, rows: npt.NDArray[np.float32], visible: npt.NDArray[np.bool_]) -> Array:
    """The embedding float64 (features,) of rows (n, width), of which hidden ones do not count."""
    seen = rows[visible].astype(np.float64)
    weights = 1.0 + np.flatnonzero(visible)
    x = {
        "first": lambda: rows[0].astype(np.float64),
        "last": lambda: rows[-1].astype(np.float64),
        "mean": lambda: seen.mean(axis=0),
        "weightedmean": lambda: weights @ seen / weights.sum(),
        "max": lambda: seen.max(axis=0),
    }[modules.pooling]()
    for layer in modules.layers:
        if isinstance(layer, LayerNorm):
            centred = x - x.mean()
            x = centred / np.sqrt((centred**2).mean() + layer.eps) * layer.weight + layer.bias
        else:
            x = _ACTIVATIONS[layer.activation](layer.weight.astype(np.float64) @ x + layer.bias)
    return x / max(float(np.linalg.norm(x)), _LEAST_LENGTH) if modules.normalize else x
