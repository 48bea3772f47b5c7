"""The parts that every attention operator is made of, in primitive nodes.

Queries, keys and values are (batch, heads, length, head_dim) here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from slmtvm.importer.expand.site import Site

_HIDDEN = -np.inf


def split_heads(site: Site, x: str, heads: int) -> str:
    """(batch, length, heads * head_dim) -> (batch, heads, length, head_dim)."""
    width = site.shape(x)[-1]
    if site.rank(x) != 3 or heads < 1 or width % heads:
        raise site.invalid(f"a value of shape {list(site.shape(x))} is not {heads} heads")
    shaped = site.op("Reshape", x, site.ints(0, 0, heads, width // heads))
    return str(site.op("Transpose", shaped, perm=(0, 2, 1, 3)))


def join_heads(site: Site, x: str) -> str:
    """(batch, heads, length, head_dim) -> (batch, length, heads * head_dim)."""
    _, heads, _, dim = site.shape(x)
    turned = site.op("Transpose", x, perm=(0, 2, 1, 3))
    return str(site.op("Reshape", turned, site.ints(0, 0, heads * dim)))


def repeat_heads(site: Site, x: str, heads: int) -> str:
    """Each of the heads of ``x`` as often as gives ``heads``."""
    _, own, _, dim = site.shape(x)
    if own == heads:
        return x
    if not own or heads % own:
        raise site.invalid(f"{heads} query heads cannot share {own} key and value heads")
    wide = site.op("Unsqueeze", x, site.ints(2))
    wide = site.op("Expand", wide, site.ints(1, 1, heads // own, 1, 1))
    return str(site.op("Reshape", wide, site.ints(0, heads, -1, dim)))


def after_past(site: Site, past: str, x: str, filled: str = "") -> str:
    """``x`` appended to what the cache holds, if there is one: its first ``filled`` positions."""
    if past and filled:
        end = site.op("Cast", site.op("Reshape", filled, site.ints(1)), to=TensorProto.INT64)
        past = site.op("Slice", past, site.ints(0), end, site.ints(2))
    return str(site.op("Concat", past, x, axis=2)) if past else x


def scale_of(site: Site, head_dim: int) -> float:
    """The attribute ``scale``; absent or 0 it is 1 / sqrt(head_dim)."""
    return float(site.attrs.get("scale", 0.0)) or 1 / math.sqrt(head_dim)


def scores_of(site: Site, q: str, k: str, scale: float) -> str:
    """``scale * q @ k.T``: (batch, heads, length, total)."""
    if site.shape(q)[-1] != site.shape(k)[-1]:
        raise site.invalid(f"heads of {site.shape(q)[-1]} queries and {site.shape(k)[-1]} keys")
    product = site.op("MatMul", q, site.op("Transpose", k, perm=(0, 1, 3, 2)))
    return str(site.op("Mul", product, site.constant(scale)))


def capped(site: Site, scores: str, cap: float) -> str:
    """``cap * tanh(scores / cap)``; a cap of 0 is none."""
    if not cap:
        return scores
    size = site.constant(cap)
    return str(site.op("Mul", site.op("Tanh", site.op("Div", scores, size)), size))


def only_where(site: Site, visible: str, scores: str) -> str:
    """``scores`` where the boolean ``visible`` is true; the others vanish in the softmax."""
    return str(site.op("Where", visible, scores, site.constant(_HIDDEN)))


def weighted(site: Site, scores: str, v: str) -> str:
    """``softmax(scores) @ v``."""
    return str(site.op("MatMul", site.op("Softmax", scores, axis=-1), v))


def places(site: Site, size: str, begin: str = "") -> str:
    """int64 (size,): begin, begin + 1, ...; sizes and begins are vectors of one element."""
    first = site.op("Squeeze", begin) if begin else site.constant(0, np.int64)
    count = site.op("Squeeze", size)
    last = site.op("Add", first, count) if begin else count
    return str(site.op("Range", first, last, site.constant(1, np.int64)))


def not_ahead(site: Site, q: str, k: str) -> str:
    """Which keys are no later than a query, the last of both being the same token's."""
    length, total = site.size(q, 2), site.size(k, 2)
    own = places(site, length, site.op("Sub", total, length))
    rows = site.op("Unsqueeze", own, site.ints(1))
    return str(site.op("LessOrEqual", places(site, total), rows))


def counted(site: Site, lengths: str, k: str) -> str:
    """Keys before ``lengths``, integers (batch,) -> boolean (batch, 1, 1, total)."""
    wide = site.op("Cast", lengths, to=TensorProto.INT64)
    wide = site.op("Unsqueeze", wide, site.ints(1, 2, 3))
    return str(site.op("Less", places(site, site.size(k, 2)), wide))


def unpadded(site: Site, mask: str, k: str) -> str:
    """The keys that a mask of com.microsoft's attention operators keeps.

    mask: 0 or 1 as (batch, total) or (batch, length, total); the number of keys (batch,); or ends
    and then beginnings (2 * batch,).
    """
    shape, batch = site.shape(mask), site.shape(k)[0]
    if len(shape) == 1:
        if shape == (batch,):
            return counted(site, mask, k)
        if shape == (2 * batch,):
            ends, begins = site.op("Split", mask, axis=0, outputs=2, num_outputs=2)
            early = site.op("Not", counted(site, begins, k))
            return str(site.op("And", counted(site, ends, k), early))
        raise site.refuse(f"a mask of shape {list(shape)}")
    kept = site.op("Cast", mask, to=TensorProto.BOOL)
    if len(shape) == 2:
        return str(site.op("Unsqueeze", kept, site.ints(1, 2)))
    if len(shape) == 3:
        return str(site.op("Unsqueeze", kept, site.ints(1)))
    raise site.refuse(f"a mask of shape {list(shape)}")


def check_alike(site: Site, *names: str) -> None:
    """Raise InvalidModelError where values that belong together differ in rank or batch."""
    shapes = [site.shape(name) for name in names]
    if len({(len(s), s[:1]) for s in shapes}) != 1:
        listing: Sequence[object] = [list(s) for s in shapes]
        raise site.invalid(f"queries, keys and values of shapes {listing}")
