"""Attention of ONNX, from operator set 23 on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from slmtvm.importer.expand.heads import (
    after_past,
    capped,
    check_alike,
    counted,
    join_heads,
    only_where,
    places,
    repeat_heads,
    scale_of,
    scores_of,
    split_heads,
    weighted,
)
from slmtvm.importer.expand.registry import expansion
from slmtvm.importer.expand.site import Site


@expansion("Attention", 23)
def attention(site: Site) -> Sequence[str]:
    """Inputs: Q, K, V, mask, past key and value, and from version 24 on the number of valid keys.

    From version 25 on, attributes bound how far back and ahead a query sees.

    Q, K and V are (batch, heads, length, head_dim), or (batch, length, heads * head_dim) with the
    numbers of heads as attributes; so is the result.
    """
    attrs = site.attrs
    q, k, v = (site.input(i) for i in range(3))
    mask, past_key, past_value, valid = (site.input(i) for i in range(3, 7))
    check_alike(site, q, k, v)
    flat = site.rank(q) == 3
    if flat:
        q = split_heads(site, q, attrs.get("q_num_heads", 0))
        k, v = (split_heads(site, x, attrs.get("kv_num_heads", 0)) for x in (k, v))
    queries = _places_of_queries(site, q, past_key, valid)
    k, v = after_past(site, past_key, k), after_past(site, past_value, v)
    _, heads, _, head_dim = site.shape(q)
    if site.shape(k)[:3] != site.shape(v)[:3]:
        raise site.invalid(f"keys of shape {list(site.shape(k))}, values {list(site.shape(v))}")
    keys, values = (repeat_heads(site, x, heads) for x in (k, v))
    scores = scores_of(site, q, keys, scale_of(site, head_dim))
    scores = capped(site, scores, attrs.get("softcap", 0.0))
    if mask and site.dtype(mask) == np.bool_:
        scores = only_where(site, mask, scores)
    elif mask:
        scores = site.op("Add", scores, mask)
    back, ahead = attrs.get("left_window_size", -1), attrs.get("right_window_size", -1)
    if attrs.get("is_causal", 0):
        ahead = 0
    if ahead >= 0:
        newest = site.op("Add", queries, site.ints(ahead))
        scores = only_where(site, site.op("LessOrEqual", _places_of_keys(site, k), newest), scores)
    if back >= 0:
        oldest = site.op("Sub", queries, site.ints(back))
        seen = site.op("GreaterOrEqual", _places_of_keys(site, k), oldest)
        scores = only_where(site, seen, scores)
    if valid:
        scores = only_where(site, counted(site, valid, keys), scores)
    y = weighted(site, scores, values)
    return [join_heads(site, y) if flat else y, k, v]


def _places_of_queries(site: Site, q: str, past: str, valid: str) -> str:
    """Where queries stand among the keys, int64 (length, 1), with ``valid`` (batch, 1, length, 1).

    They come after the past; in a buffer with a number of valid keys they are the last of these.
    """
    length = site.size(q, 2)
    own = site.op("Unsqueeze", places(site, length), site.ints(1))
    if valid:
        before = site.op("Sub", site.op("Cast", valid, to=TensorProto.INT64), length)
        return str(site.op("Add", own, site.op("Unsqueeze", before, site.ints(1, 2, 3))))
    return str(site.op("Add", own, site.op("Shape", past, start=2, end=3))) if past else own


def _places_of_keys(site: Site, k: str) -> str:
    return places(site, site.size(k, 2))
