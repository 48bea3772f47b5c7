"""Which recognisers are asked about a value, in order: the first that knows it says what it is.

A new one is a function and a line here.
"""

from __future__ import annotations

from collections.abc import Callable

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.graph import Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.recognise.attention.attention import match_attention
from slmtvm.importer.recognise.attention.cross import Source, match_cross_attention
from slmtvm.importer.recognise.convolution import (
    match_convolution,
    match_int8_convolution,
    match_trimmed_convolution,
)
from slmtvm.importer.recognise.cover import Cover, Recogniser
from slmtvm.importer.recognise.experts.experts import match_combined, match_experts, match_mixture
from slmtvm.importer.recognise.fused import match_fused
from slmtvm.importer.recognise.linear.linear import match_int8_linear, match_linear, with_bias
from slmtvm.importer.recognise.rounding.integer_pairs import match_integer_pair
from slmtvm.importer.recognise.rounding.rounding import match_rounding
from slmtvm.importer.recognise.rows.embedding import (
    match_dequantized_rows,
    match_embedding,
    match_restored_rows,
)
from slmtvm.importer.recognise.rows.general import match_concat, match_reduction
from slmtvm.importer.recognise.rows.norm import match_norm
from slmtvm.importer.recognise.rows.pointwise import match_activation, match_elementwise
from slmtvm.importer.recognise.steps import Step

_Match = Callable[[Cover, Node, str], "Step | None"]


def _of_node(match: Callable[[Cover, Node], Step | None]) -> _Match:
    return lambda cover, node, value: match(cover, node)


def _of_value(match: Callable[[Cover, str], Step | None]) -> _Match:
    return lambda cover, node, value: match(cover, value)


def _of_product(match: Callable[[Cover, str], Step | None]) -> _Match:
    """Integers are multiplied by their scales last."""
    return lambda cover, node, value: match(cover, value) if node.op_type == "Mul" else None


# Operators that say by themselves what they are.
_BY_OPERATOR: dict[str, _Match] = {
    "MoE": _of_node(match_mixture),
    "QMoE": _of_node(match_mixture),
}
_BY_KIND: dict[Kind, tuple[_Match, ...]] = {
    Kind.CONVOLVE: (match_convolution,),
    Kind.FUSED: (match_fused,),
    Kind.CONTRACT: (_of_node(match_linear), _of_node(match_attention)),
    Kind.ELEMENTWISE: (
        _of_product(match_int8_linear),
        _of_product(lambda cover, value: match_int8_convolution(cover, value, value)),
        match_combined,
        _of_value(match_rounding),
        _of_value(match_dequantized_rows),
        _of_value(match_restored_rows),
        match_integer_pair,
        _of_value(with_bias),
        _of_value(match_activation),
        _of_value(match_norm),
        _of_value(match_elementwise),
    ),
    Kind.REDUCE: (_of_value(match_norm), _of_value(match_experts), match_reduction, match_concat),
    Kind.SCATTER: (_of_value(match_experts), match_reduction, match_concat),
    Kind.MOVE: (match_trimmed_convolution, match_reduction, match_concat),
}
_OTHERS: tuple[_Match, ...] = (match_reduction, match_concat)


def recognise(cover: Cover, node: Node, value: str) -> Step:
    """What ``value`` is, which ``node`` makes.

    Raises UnsupportedOpError where nothing recognises it.
    """
    for match in _matches(cover, node):
        found = match(cover, node, value)
        if found is not None:
            return found
    raise UnsupportedOpError(
        "is used on values that depend on tokens in a way that is not recognised",
        where=cover.frame.graph.where(node),
    )


def recognise_after(source: Source) -> Recogniser:
    """``recognise`` in the graph of a decoder, which attends over ``source``."""

    def with_source(cover: Cover, node: Node, value: str) -> Step:
        if source.reads(cover, node):
            return match_cross_attention(cover, source, node)
        return recognise(cover, node, value)

    return with_source


def _matches(cover: Cover, node: Node) -> tuple[_Match, ...]:
    if node.op_type in _BY_OPERATOR:
        return (_BY_OPERATOR[node.op_type],)
    if cover.frame.small.is_lookup(node):
        return (_of_node(match_embedding),)
    return _BY_KIND.get(operator_of(node).kind, _OTHERS)
