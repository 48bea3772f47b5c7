"""onnxruntime's attention operators."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import AttributeProto

from slmtvm.importer.expand.heads import (
    after_past,
    check_alike,
    join_heads,
    not_ahead,
    only_where,
    scale_of,
    scores_of,
    split_heads,
    unpadded,
    weighted,
)
from slmtvm.importer.expand.quantized import scaled_product
from slmtvm.importer.expand.registry import MICROSOFT, expansion
from slmtvm.importer.expand.site import Site
from slmtvm.importer.operators.registry import FLOAT, INT

_INTS = int(AttributeProto.INTS)
_ATTENTION = {
    "num_heads": (INT, True),
    "unidirectional": (INT, False),
    "scale": (FLOAT, False),
    "mask_filter_value": (FLOAT, False),
    "do_rotary": (INT, False),
    "rotary_embedding_dim": (INT, False),
    "past_present_share_buffer": (INT, False),
}


@expansion(
    "Attention", 1, MICROSOFT, arity=(2, 7),
    attributes={**_ATTENTION, "qkv_hidden_sizes": (_INTS, False)},
)  # fmt: skip
def attention(site: Site) -> Sequence[str]:
    """Inputs: x, weights, bias, mask_index, past, attention_bias, past_sequence_length."""
    packed = site.op("MatMul", site.input(0), site.input(1))
    if site.input(2):
        packed = site.op("Add", packed, site.input(2))
    return _self_attention(site, packed, mask=site.input(3), past=site.input(4), bias=site.input(5))


@expansion("QAttention", 1, MICROSOFT, arity=(5, 9), attributes=_ATTENTION)
def quantized_attention(site: Site) -> Sequence[str]:
    """Inputs: x, weight, bias, x's and the weight's scale, mask_index, both zero points, past."""
    x, weight, bias, scale, weight_scale, mask = (site.input(i) for i in range(6))
    zeros = (site.input(6), site.input(7))
    packed = scaled_product(site, (x, weight), zeros, (scale, weight_scale), bias)
    return _self_attention(site, packed, mask=mask, past=site.input(8), bias="")


def _self_attention(site: Site, packed: str, *, mask: str, past: str, bias: str) -> Sequence[str]:
    """Attention on packed projections (batch, length, queries + keys + values)."""
    attrs = site.attrs
    if attrs.get("do_rotary", 0):
        raise site.refuse("an attention that rotates by tables of its own (do_rotary)")
    if site.rank(packed) != 3:
        raise site.invalid(f"projections of shape {list(site.shape(packed))}")
    width = site.shape(packed)[-1]
    sizes = attrs.get("qkv_hidden_sizes") or (width // 3,) * 3
    if sum(sizes) != width or len(sizes) != 3:
        raise site.invalid(f"{width} features are not {list(sizes)} of queries, keys and values")
    parts = site.op("Split", packed, site.ints(*sizes), axis=2, outputs=3)
    q, k, v = (split_heads(site, part, attrs["num_heads"]) for part in parts)
    if past:
        halves = site.op("Split", past, axis=0, outputs=2, num_outputs=2)
        k, v = (
            after_past(site, site.op("Squeeze", half, site.ints(0)), own)
            for half, own in zip(halves, (k, v), strict=True)
        )
    causal = bool(attrs.get("unidirectional", 0))
    result = _attend(site, q, k, v, mask=mask, bias=bias, causal=causal)
    if not site.wants(1):
        return [result]
    both = [site.op("Unsqueeze", x, site.ints(0)) for x in (k, v)]
    return [result, site.op("Concat", *both, axis=0)]


def _attend(site: Site, q: str, k: str, v: str, *, mask: str, bias: str, causal: bool) -> str:
    """-> (batch, length, heads * head_dim); in a bias and a mask, keys run along the last axis."""
    scores = scores_of(site, q, k, scale_of(site, site.shape(q)[-1]))
    if bias:
        scores = site.op("Add", scores, bias)
    if mask:
        scores = only_where(site, unpadded(site, mask, k), scores)
    if causal:
        scores = only_where(site, not_ahead(site, q, k), scores)
    return join_heads(site, weighted(site, scores, v))


@expansion(
    "MultiHeadAttention", 1, MICROSOFT, arity=(1, 10),
    attributes={
        "num_heads": (INT, True),
        "unidirectional": (INT, False),
        "scale": (FLOAT, False),
        "mask_filter_value": (FLOAT, False),
    },
)  # fmt: skip
def multi_head_attention(site: Site) -> Sequence[str]:
    """Inputs: query, key, value, bias, padding mask, attention bias, past key and value and length.

    The last is there where the past is a buffer that is longer than what it holds.
    """
    bias, mask, attention_bias, past_key, past_value = (site.input(i) for i in range(3, 8))
    q, k, v = _projections(site, bias)
    k, v = (after_past(site, p, x, site.input(8)) for p, x in ((past_key, k), (past_value, v)))
    causal = bool(site.attrs.get("unidirectional", 0))
    result = _attend(site, q, k, v, mask=mask, bias=attention_bias, causal=causal)
    return [result, k, v]


@expansion(
    "DecoderMaskedMultiHeadAttention", 1, MICROSOFT, arity=(1, 11),
    attributes={
        "num_heads": (INT, True),
        "output_qk": (INT, False),
        "scale": (FLOAT, False),
        "mask_filter_value": (FLOAT, False),
        "past_present_share_buffer": (INT, False),
    },
)  # fmt: skip
def decoder_masked_attention(site: Site) -> Sequence[str]:
    """The above for one new token, which sees all before it; so the next ones do here.

    Inputs: query, key, value, mask_index, attention bias, past key and value and its length, two
    for beam search, bias.
    """
    mask, attention_bias, past_key, past_value = (site.input(i) for i in range(3, 7))
    q, k, v = _projections(site, site.input(10))
    k, v = (after_past(site, p, x, site.input(7)) for p, x in ((past_key, k), (past_value, v)))
    return [_attend(site, q, k, v, mask=mask, bias=attention_bias, causal=True), k, v]


def _projections(site: Site, bias: str) -> tuple[str, str, str]:
    """Queries, keys and values by head, from whichever way they are packed.

    query (batch, length, features) with key and value like it, or as heads (batch, heads, total,
    head_dim), or with both packed as key (batch, total, heads, 2, head_dim); or all packed as
    query (batch, length, heads, 3, head_dim).
    """
    query, key, value = (site.input(i) for i in range(3))
    heads = site.attrs["num_heads"]
    q_bias, k_bias, v_bias = _biases(site, bias, heads)
    if site.rank(query) == 5:
        if key or value:
            raise site.invalid("packed projections and keys or values beside them")
        q, k, v = _unpacked(site, query, 3)
        return _biased(site, q, q_bias), _biased(site, k, k_bias), _biased(site, v, v_bias)
    if not key:
        raise site.refuse("an attention without keys, or with packed ones of rank 3,")
    q = _biased(site, split_heads(site, query, heads), q_bias)
    if site.rank(key) == 5:
        if value:
            raise site.invalid("packed keys and values, and values beside them")
        k, v = _unpacked(site, key, 2)
    else:
        check_alike(site, key, value)
        by_head = site.rank(key) == 4
        k, v = (x if by_head else split_heads(site, x, heads) for x in (key, value))
        if by_head:
            k_bias = v_bias = ""  # keys and values of another step have theirs already
    return q, _biased(site, k, k_bias), _biased(site, v, v_bias)


def _unpacked(site: Site, packed: str, count: int) -> list[str]:
    """(batch, length, heads, count, head_dim) -> (batch, heads, length, head_dim), count times."""
    if site.shape(packed)[3] != count:
        raise site.invalid(f"a packed value of shape {list(site.shape(packed))}")
    parts = site.op("Split", packed, axis=3, outputs=count, num_outputs=count)
    flat = [site.op("Squeeze", part, site.ints(3)) for part in parts]
    return [str(site.op("Transpose", part, perm=(0, 2, 1, 3))) for part in flat]


def _biases(site: Site, bias: str, heads: int) -> list[str]:
    """The biases of queries, keys and values by head (heads, 1, head_dim), or "" three times."""
    if not bias:
        return ["", "", ""]
    value = site.input(2)
    total = site.shape(bias)[0]
    width = total // 3
    if value and site.rank(value) == 3:
        values = site.shape(value)[-1]
        width = (total - values) // 2
    sizes = site.ints(width, width, total - 2 * width)
    parts = site.op("Split", bias, sizes, axis=0, outputs=3)
    return [str(site.op("Reshape", part, site.ints(heads, 1, -1))) for part in parts]


def _biased(site: Site, x: str, bias: str) -> str:
    return str(site.op("Add", x, bias)) if bias else x
