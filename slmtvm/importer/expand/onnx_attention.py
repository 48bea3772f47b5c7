"""Attention of ONNX, from operator set 23 on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slmtvm.importer.expand.heads import (
    after_past,
    capped,
    check_alike,
    counted,
    join_heads,
    not_ahead,
    only_where,
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
    if attrs.get("is_causal", 0):
        scores = only_where(site, not_ahead(site, q, keys), scores)
    if valid:
        scores = only_where(site, counted(site, valid, keys), scores)
    y = weighted(site, scores, values)
    return [join_heads(site, y) if flat else y, k, v]
