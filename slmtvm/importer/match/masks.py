"""What kind of mask an attention has, in words."""

from __future__ import annotations

import numpy as np

from slmtvm.importer.graph import Array


def describe(mask: Array, visible: Array) -> str:
    """mask: float (heads or 1, n, n) added to scores; visible: bool, where it hides nothing.

    -> "causal", "bidirectional", or what it is instead.
    """
    if (visible != visible[:1]).any():
        return "different from head to head"
    if (mask[visible] != 0).any():
        return "a bias that grows with the distance or is learned (ALiBi, relative positions)"
    n = mask.shape[-1]
    seen = visible[0]
    if seen.all():
        return "bidirectional"
    rows, columns = np.indices((n, n), sparse=True)
    if (seen == (columns <= rows)).all():
        return "causal"
    window = int(seen[-1].sum())
    if (seen == ((columns <= rows) & (columns > rows - window))).all():
        return f"a sliding window of {window} positions"
    return "neither causal nor bidirectional nor a sliding window"
