"""Attention, found from its softmax outwards."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.frame.frame import Frame, Trace
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.recognise.attention.rope import match_rope
from slmtvm.importer.recognise.attention.scale import scaled_queries
from slmtvm.importer.recognise.attention.scores import match_scores
from slmtvm.importer.recognise.cover import Cover, Weighing
from slmtvm.importer.recognise.evidence.regions import dominators
from slmtvm.importer.recognise.rounding.dynamic_rounding import rounded_rows
from slmtvm.importer.recognise.rounding.rounding import as_text, share_of, weight_roundings
from slmtvm.importer.recognise.steps import Attention, Param, Reordered, Rope, Rows
from slmtvm.importer.rewrite.integer_products import ROUNDS_SIDES

_ROUNDED = "queries, keys and values that are quantized dynamically"
_CHANGED_WEIGHTS = "the softmax is changed before it weights the values"


def match_attention(cover: Cover, node: Node) -> Attention:
    """The product of probabilities and values, with everything back to q, k and v.

    Raises UnsupportedOpError where it is not an attention that can be compiled, saying why.
    """
    frame = cover.frame
    where = frame.graph.where(node)
    if node.op_type != "MatMul":
        raise UnsupportedOpError("a product of two values that depend on tokens", where=where)
    probabilities, share = softmax_of(cover, node, where)
    softmax = frame.producers[probabilities]
    raw = _raw_scores(cover, softmax)
    product = frame.producers[raw]
    shape = frame.small.shapes[raw]
    lead, length = shape[:-2], frame.small.length
    if shape[-2:] != (length, length):
        raise UnsupportedOpError(
            f"scores of shape {list(shape)} are not one square for each head, of {length} queries "
            "and keys; keys that are mixed along the sequence (Linformer) are not supported",
            where=frame.graph.where(product),
        )
    scores = match_scores(cover, raw, softmax)
    q, q_factor = heads_of(cover, product.inputs[0], lead, transposed=False)
    k, k_factor = heads_of(cover, product.inputs[1], lead, transposed=True)
    # Between the two products, heads may become another number of dimensions.
    weighted = frame.small.shapes[node.inputs[0]][:-2]
    v, v_factor = heads_of(cover, node.inputs[1], weighted, transposed=False)
    if v_factor != 1.0:
        raise UnsupportedOpError("values scaled by a constant are not supported", where=where)
    num_heads, head_dim = q.features.shape
    kv_heads, k_features = distinct_heads(k, where)
    v_heads, v_features = distinct_heads(v, where)
    q_rows, q_scale = _rotated(cover, q.source, q.features, head_dim)
    k_rows, k_scale = _rotated(cover, k.source, k_features, head_dim)
    kv_heads, k_rows = _rotated_once(cover, k_rows, kv_heads, where)
    if v_heads < kv_heads and kv_heads % v_heads == 0:
        times = kv_heads // v_heads
        cover.note(f"{times} key heads share a value head, which is cached {times} times")
        v_heads, v_features = kv_heads, np.repeat(v_features, times, axis=0)
    if v_heads != kv_heads or v_features.shape[1] != head_dim or k_features.shape[1] != head_dim:
        raise UnsupportedOpError(
            f"queries of {num_heads} x {head_dim}, keys of {kv_heads} x {k_features.shape[1]} and "
            f"values of {v_heads} x {v_features.shape[1]} features are not supported",
            where=where,
        )
    if product.attrs.get(ROUNDS_SIDES):
        q_rows, k_rows = (
            rounded_rows(cover, rows, heads * head_dim, _ROUNDED)
            for rows, heads in ((q_rows, num_heads), (k_rows, kv_heads))
        )
    v_rows = cover.columns(v.source, v_features.reshape(-1))
    if node.attrs.get(ROUNDS_SIDES):
        v_rows = rounded_rows(cover, v_rows, v_features.size, _ROUNDED)
        cover.note("probabilities of attentions, which the file rounds dynamically, stay float32")
    before = q_factor * k_factor * q_scale * k_scale
    roundings = scores.roundings
    weight_steps, product_of_weights = weight_roundings(cover, probabilities, node.inputs[0], where)
    if share != product_of_weights:
        raise UnsupportedOpError(_CHANGED_WEIGHTS, where=where)
    cover.weighings.append(
        Weighing(raw, softmax.inputs[0], probabilities, node.inputs[0], exact=bool(roundings.sums))
    )
    scale = scores.scale / roundings.scaled if roundings.products else scores.scale * before
    q_rows, scale, softcap = scaled_queries(
        cover, q_rows, scale, scores.softcap, where,
        products_rounded=bool(roundings.products), sums_rounded=bool(roundings.sums),
    )  # fmt: skip
    return Attention(
        q_rows,
        k_rows,
        v_rows,
        num_heads,
        kv_heads,
        head_dim,
        scale,
        scores.mask.kind,
        scores.mask.window,
        scores.mask.chunk,
        softcap,
        head_bias(cover, scores.mask.bias, num_heads, where),
        scores.mask.bias_by,
        visible=head_mask(cover, scores.mask.visible, num_heads, where),
        roundings=as_text(roundings.products, before),
        sum_roundings=as_text(roundings.sums),
        weight_roundings=as_text(weight_steps),
    )


def head_bias(cover: Cover, bias: Array | None, num_heads: int, where: str) -> Param | None:
    """The bias with a row for each head."""
    if bias is None:
        return None
    if len(bias) not in (1, num_heads):
        raise UnsupportedOpError(
            f"a bias for {len(bias)} heads on scores of {num_heads}", where=where
        )
    return cover.table("attention.bias", np.broadcast_to(bias, (num_heads, bias.shape[1])))


def head_mask(cover: Cover, visible: Array | None, num_heads: int, where: str) -> Param | None:
    """Which positions are seen, as bits, for all heads or each; see ``ir.ops.attention``."""
    if visible is None:
        return None
    if len(visible) not in (1, num_heads):
        raise UnsupportedOpError(
            f"a mask for {len(visible)} heads on scores of {num_heads}", where=where
        )
    if (visible == visible[:1]).all():
        visible = visible[:1]
    cover.note(_share(visible))
    return cover.table("attention.visible", np.packbits(visible, axis=-1))


def _share(visible: Array) -> str:
    return (
        f"attentions see {visible.mean():.0%} of all pairs of positions by a mask of their own: "
        "blocks that are hidden cost nothing"
    )


def passes_through(cover: Cover, node: Node) -> bool:
    kind = operator_of(node).kind
    return kind in (Kind.ELEMENTWISE, Kind.MOVE, Kind.ROUND) and not cover.frame.small.is_lookup(
        node
    )


def softmax_of(cover: Cover, node: Node, where: str) -> tuple[str, float]:
    """The softmax whose values, times a number, are the left side of ``node``, and that number."""
    frame = cover.frame
    left = node.inputs[0]
    chain = [left, *dominators(frame, left, lambda n: passes_through(cover, n))]
    softmax = frame.producers.get(chain[-1])
    if softmax is None or softmax.op_type != "Softmax":
        raise UnsupportedOpError(
            "a product of two values that depend on tokens, which is not an attention: its left "
            "side does not come from a softmax",
            where=where,
        )
    shape = frame.small.shapes[chain[-1]]
    share = share_of(frame, chain[-1], left)
    if share is None or frame.small.shapes[left][-2:] != shape[-2:]:
        raise UnsupportedOpError(_CHANGED_WEIGHTS, where=where)
    operator = operator_of(softmax)
    assert operator.axes is not None
    axes, _ = operator.axes(softmax.attrs, (), len(shape))
    if axes != (len(shape) - 1,):
        raise UnsupportedOpError("the softmax does not run over keys", where=where)
    return chain[-1], share


def _raw_scores(cover: Cover, softmax: Node) -> str:
    frame = cover.frame
    chain = [
        softmax.inputs[0],
        *dominators(frame, softmax.inputs[0], lambda n: passes_through(cover, n)),
    ]
    product = frame.producers.get(chain[-1])
    if product is None or product.op_type != "MatMul" or len(frame.dynamic(product)) != 2:
        raise UnsupportedOpError(
            "the scores of this softmax are not a product of queries and keys with a constant "
            "mask and scale",
            where=frame.graph.where(softmax),
        )
    return chain[-1]


@dataclass(frozen=True)
class Heads:
    """One side of an attention: feature ``features[head, d]`` of the rows of ``source``."""

    source: str
    features: Array


def heads_of(
    cover: Cover, value: str, lead: tuple[int, ...], *, transposed: bool
) -> tuple[Heads, float]:
    """Where the elements (heads, length, head_dim) of a product's operand come from."""
    trace = cover.frame.trace(value, scaled=True)
    heads = arrange_heads(cover.frame, trace, lead, value, transposed=transposed)
    return heads, trace.factor


def arrange_heads(
    frame: Frame, trace: Trace, lead: tuple[int, ...], value: str, *, transposed: bool
) -> Heads:
    """The heads that ``trace``, of a product's operand ``value``, takes from its source's rows."""
    index = np.swapaxes(trace.index, -1, -2) if transposed else trace.index
    length, dim = index.shape[-2:]
    index = np.broadcast_to(index, (*lead, length, dim)).reshape(-1, length, dim)
    token, feature = frame.places(trace.source, index)
    positions = np.arange(frame.small.length)
    if length != frame.small.length or (token != positions[None, :, None]).any():
        raise UnsupportedOpError(
            f"{value!r} does not hold the positions in order", where=frame.where(value)
        )
    if (feature != feature[:, :1]).any():
        raise UnsupportedOpError(
            f"{value!r} takes other features at other positions", where=frame.where(value)
        )
    return Heads(trace.source, feature[:, 0])


def distinct_heads(side: Heads, where: str) -> tuple[int, Array]:
    """Key or value heads without repeats, and their features."""
    heads = len(side.features)
    changes = (side.features[1:] != side.features[:-1]).any(axis=1)
    count = 1 + int(changes.sum())
    group = heads // count
    distinct = side.features[::group] if heads % count == 0 else side.features
    if heads % count or (np.repeat(distinct, group, axis=0) != side.features).any():
        raise UnsupportedOpError(
            "query heads share key and value heads in groups that are not equal", where=where
        )
    return count, distinct


def _rotated(cover: Cover, source: str, features: Array, head_dim: int) -> tuple[Rows, float]:
    """The rows of queries or keys, as a rope where they are one, and the factor taken out."""
    flat = features.reshape(-1)
    width = cover.frame.features(source)
    if flat.size == width and (flat == np.arange(width)).all():
        found = match_rope(cover, source, head_dim)
        if found is not None:
            rope, factor = found
            # Attention's scale takes the factor over.
            if factor != 1.0:
                return cover.add(f"{source}#rope", rope), factor
            return cover.know(source, rope), factor
    return cover.columns(source, flat), 1.0


def _rotated_once(cover: Cover, keys: Rows, heads: int, where: str) -> tuple[int, Rows]:
    """Key heads that are repeated before they are rotated (Falcon), rotated and then repeated."""
    rope = cover.steps.get(keys)
    if not isinstance(rope, Rope):
        return heads, keys
    repeated = cover.steps.get(rope.x)
    if not isinstance(repeated, Reordered):
        return heads, keys
    features = repeated.features.array.reshape(heads, -1)
    count, distinct = distinct_heads(Heads(repeated.x, features), where)
    x = cover.columns(repeated.x, distinct.reshape(-1))
    return count, cover.add(f"{keys}#{count}", replace(rope, x=x, num_heads=count))
