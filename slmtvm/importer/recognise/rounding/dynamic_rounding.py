"""Rows rounded as DynamicQuantizeLinear rounds them, where no linear layer reads the integers."""

from __future__ import annotations

import numpy as np

from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.steps import Linear, Param, Rows, Weights


def rounded_rows(cover: Cover, rows: Rows, width: int, what: str) -> Rows:
    """``rows`` of so many features as DynamicQuantizeLinear rounds them: what an int8 layer whose
    weight is the identity makes of them. ``what`` they are is for the note of what that costs."""
    cover.note(
        f"{what} are rounded by a product with the identity: {width * width} multiply-adds a token "
        "for each"
    )
    key = ("identity", width)
    if key not in cover.cache:
        cover.cache[key] = Weights(
            "int8",
            Param(f"identity{width}", np.eye(width, dtype=np.int8)),
            Param(f"identity{width}.scale", np.ones(1, np.float32)),
        )
    weights = cover.cache[key]
    assert isinstance(weights, Weights)
    step = Linear(rows, weights, None, width, width, "row_u8")
    return cover.add(f"{rows}#rounded", step)
