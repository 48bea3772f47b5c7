"""The toy decoder with exits that most of its tokens can take: its last layers say little."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slmtvm.ir.model import CanonicalModel, Exit
from slmtvm.passes.exits import with_exits
from tests.passes.toy import decoder

LAYERS, FIRST_QUIET = 4, 2


def quiet_decoder(weight_format: str = "f32", loudness: float = 0.05) -> CanonicalModel:
    """A decoder of LAYERS, of which those from FIRST_QUIET on add little to their rows."""
    model = decoder(weight_format, layers=LAYERS)
    params = dict(model.params)
    for layer in range(FIRST_QUIET, LAYERS):
        for name in ("o", "down"):
            part = "weight" if weight_format == "f32" else "scales"
            key = f"{layer}.{name}.{part}"
            params[key] = params[key] * np.float32(loudness)
    return replace(model, params=params)


def exiting(model: CanonicalModel, margins: dict[int, float]) -> CanonicalModel:
    """``model`` with exits after so many layers, each from its margin on."""
    return with_exits(model, [Exit(layer, margin=margin) for layer, margin in margins.items()])
