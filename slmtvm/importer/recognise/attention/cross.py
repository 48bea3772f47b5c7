"""Attention of a decoder's rows over the source that an encoder has read."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.frame.frame import Frame, Trace, uniform
from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.recognise.attention.attention import (
    Heads,
    arrange_heads,
    distinct_heads,
    heads_of,
    passes_through,
    softmax_of,
)
from slmtvm.importer.recognise.attention.scale import scaled_queries
from slmtvm.importer.recognise.cover import Cover, Weighing
from slmtvm.importer.recognise.evidence.pieces import is_linear
from slmtvm.importer.recognise.evidence.ranges import FINITE
from slmtvm.importer.recognise.evidence.regions import between, dominators, evaluate
from slmtvm.importer.recognise.rounding.rounding import as_text, score_roundings, weight_roundings
from slmtvm.importer.recognise.steps import CrossAttention, Rows

_TOLERANCE = 1e-5
_NUMBER_TOLERANCE = 1e-3  # of a number that was multiplied and divided in float64


@dataclass(frozen=True)
class Remembered:
    """Keys and values of one cross-attention, as rows of the source's cover."""

    k: Rows
    v: Rows
    num_kv_heads: int
    head_dim: int


@dataclass
class Source:
    """What a decoder's graph takes from its encoder's.

    ``cover`` is of the encoder's graph. In the decoder's there are ``stand_ins`` for its values:
    constants whose elements are numbered through, the first with the number that is given here. So
    an element can be recognised wherever the decoder's graph has moved it. Its graph frozen with
    ones in their place, ``ones``, holds what elements are multiplied by on the way. ``remembered``,
    and the values ``used`` for it, fill as cross-attentions are found.
    """

    cover: Cover
    stand_ins: dict[str, int]
    ones: Frozen
    remembered: dict[str, Remembered] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def reads(self, cover: Cover, node: Node) -> bool:
        """Whether ``node`` of the decoder's graph multiplies by values of the source."""
        return node.op_type == "MatMul" and self.trace(cover.frame, node.inputs[1]) is not None

    def trace(self, frame: Frame, value: str) -> Trace | None:
        """A constant of the decoder's graph as elements of a value of the encoder's, or None."""
        constant, factor = frame.small.constants.get(value), uniform(self.ones, value)
        if constant is None or not constant.plain or constant.dtype.kind != "f" or not factor:
            return None
        numbers = constant.stored.astype(np.float64) / factor
        elements = np.rint(numbers)
        names = [n for n, start in self.stand_ins.items() if start <= elements.flat[0]]
        if not names or (np.abs(elements - numbers) > _NUMBER_TOLERANCE).any():
            return None
        theirs = self.cover.frame
        name = max(names, key=lambda n: self.stand_ins[n])
        index = elements.astype(np.int64) - self.stand_ins[name]
        if (index < 0).any() or (index >= np.prod(theirs.small.shapes[name])).any():
            return None
        before = theirs.trace(name, scaled=True)
        return Trace(before.source, before.index.reshape(-1)[index], before.factor * factor)


def match_cross_attention(cover: Cover, source: Source, node: Node) -> CrossAttention:
    """The product of probabilities and the source's values, with everything back to the queries.

    Raises UnsupportedOpError where it is not an attention over the whole source.
    """
    frame = cover.frame
    where = frame.graph.where(node)
    probabilities, share = softmax_of(cover, node, where)
    softmax = frame.producers[probabilities]
    chain = [
        softmax.inputs[0],
        *dominators(frame, softmax.inputs[0], lambda n: passes_through(cover, n)),
    ]
    product = frame.producers.get(chain[-1])
    weight_steps, product_of_weights = weight_roundings(cover, probabilities, node.inputs[0], where)
    changed = share != product_of_weights
    if product is None or changed or not source.reads(cover, product):
        raise UnsupportedOpError(
            "values of the source are weighted by what is not a softmax of queries and keys of the "
            "source",
            where=where,
        )
    raw = product.outputs[0]
    lead = frame.small.shapes[raw][:-2]
    q, q_factor = heads_of(cover, product.inputs[0], lead, transposed=False)
    (k, k_factor), (v, v_factor) = (
        _source_heads(cover, source, value, lead, transposed=transposed)
        for value, transposed in ((product.inputs[1], True), (node.inputs[1], False))
    )
    if v_factor != 1.0:
        raise UnsupportedOpError(
            f"values of the source are multiplied by {v_factor:g} in the decoder, which is not "
            "supported; multiply the weights that make them instead",
            where=where,
        )
    num_heads, head_dim = q.features.shape
    kv_heads, k_features = distinct_heads(k, where)
    v_heads, v_features = distinct_heads(v, where)
    if (v_heads, v_features.shape) != (kv_heads, k_features.shape):
        raise UnsupportedOpError(
            f"cross-attention with {kv_heads} heads of {k_features.shape[1]} keys and {v_heads} of "
            f"{v_features.shape[1]} values is not supported",
            where=where,
        )
    kept = Remembered(
        source.cover.columns(k.source, k_features.reshape(-1)),
        source.cover.columns(v.source, v_features.reshape(-1)),
        kv_heads,
        head_dim,
    )
    # Layers that read the same keys and values share them, and no others.
    key = f"{kept.k} {kept.v} {kv_heads}x{head_dim}"
    source.remembered[key] = kept
    scale, zero = _scale(cover, raw, softmax)

    def added_at(value: str) -> Array:
        nodes, zeros = between(frame, raw, value), np.zeros(frame.small.shapes[raw])
        return evaluate(frame.small, nodes, {raw: zeros}, value) if nodes else zeros

    roundings = score_roundings(cover, raw, softmax.inputs[0], scale, zero, added_at, where)
    if roundings.sums:
        raise UnsupportedOpError(
            "scores of a cross-attention are rounded after something was added to them, which is "
            "not supported; exclude the addition when quantizing",
            where=where,
        )
    rows = cover.columns(q.source, q.features.reshape(-1))
    cover.weighings.append(
        Weighing(raw, softmax.inputs[0], softmax.outputs[0], node.inputs[0], of_source=True)
    )
    before = q_factor * k_factor
    scale = scale / roundings.scaled if roundings.products else scale * before
    rows, scale, _ = scaled_queries(
        cover, rows, scale, 0.0, where, products_rounded=bool(roundings.products)
    )
    return CrossAttention(
        rows, key, num_heads, kv_heads, head_dim, scale,
        as_text(roundings.products, before), as_text(weight_steps),
    )  # fmt: skip


def _source_heads(
    cover: Cover, source: Source, value: str, lead: tuple[int, ...], *, transposed: bool
) -> tuple[Heads, float]:
    trace = source.trace(cover.frame, value)
    assert trace is not None
    source.used.add(trace.source)
    heads = arrange_heads(source.cover.frame, trace, lead, value, transposed=transposed)
    return heads, trace.factor


def _scale(cover: Cover, raw: str, softmax: Node) -> tuple[float, Array]:
    """The factor of scores on their way to ``softmax``, and what is added to them.

    The latter, of their shape, is the same for all of a row: nothing else may happen to them.
    """
    frame, output = cover.frame, softmax.inputs[0]
    nodes, shape = between(frame, raw, output), frame.small.shapes[raw]
    samples = cover.random.normal(size=shape)
    zero, result = (
        evaluate(frame.small, nodes, {raw: scores}, output).reshape(shape)
        for scores in (np.zeros(shape), samples)
    )
    slope = (result - zero) / samples
    scale = float(np.median(slope))
    straight = np.abs(slope - scale).max() <= _TOLERANCE * max(abs(scale), 1e-3)
    straight &= frame.is_fixed(nodes) and is_linear(frame.small, nodes, {raw: FINITE})
    # What is the same for all of a row's scores goes out in the softmax.
    if not straight or (zero.max(axis=-1) != zero.min(axis=-1)).any():
        raise UnsupportedOpError(
            "scores of a cross-attention pass through more than a scale before the softmax",
            where=frame.graph.where(softmax),
        )
    return scale, zero
