"""The scale and the cap of attention's scores, as kernels take them."""

from __future__ import annotations

import math

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.steps import Elementwise, Rows

_SMALLEST, _LARGEST = (float(v) for v in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
_LEAST_CAP = 1e-30  # scores within it are 0 for every softmax; a scale over it is finite


def scaled_queries(
    cover: Cover,
    q: Rows,
    scale: float,
    softcap: float,
    where: str,
    *,
    products_rounded: bool = False,
    sums_rounded: bool = False,
) -> tuple[Rows, float, float]:
    """The queries, scale and cap of an attention whose scores are those of the given ones.

    Kernels take scales and caps that are positive float32 numbers. A scale that is negative, zero
    or tiny goes into the queries. Refused are a scale beyond float32 and, where the file rounds
    products before the scale, or sums after the cap, what would change these.
    """
    if not math.isfinite(scale) or abs(scale) > _LARGEST:
        raise UnsupportedOpError(f"scores are multiplied by {scale}", where=where)
    if 0 < softcap < _LEAST_CAP:
        if sums_rounded:
            raise UnsupportedOpError(f"scores are capped at {softcap:g} and rounded", where=where)
        scale, softcap = 0.0, 0.0
    if scale >= _SMALLEST:
        return q, scale, softcap
    if products_rounded:
        raise UnsupportedOpError(
            f"scores that are rounded and then multiplied by {scale:g}, which is not positive, are "
            "not supported",
            where=where,
        )
    return cover.add(f"{q}#scaled", Elementwise("multiply", (q, scale))), 1.0, softcap
