"""Embedding layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
from onnx import TensorProto

from slmtvm.importer.expand.heads import places
from slmtvm.importer.expand.registry import MICROSOFT, expansion
from slmtvm.importer.expand.site import Site
from slmtvm.importer.graph import Constant
from slmtvm.importer.operators.registry import FLOAT, INT

_EPSILON = 1e-12  # the operator's default


@expansion(
    "EmbedLayerNormalization", 1, MICROSOFT, arity=(1, 9),
    attributes={"epsilon": (FLOAT, False), "mask_index_type": (INT, False)},
)  # fmt: skip
def embed_layer_normalization(site: Site) -> Sequence[str]:
    """The norm of the word's, the position's and the segment's rows together."""
    ids, segments, words, positions, segment_table = (site.input(i) for i in range(5))
    gamma, beta, mask, chosen = (site.input(i) for i in range(5, 9))
    _check_present(site, ids, words, positions, gamma, beta)
    _check_segments(site, segments, segment_table)
    chosen = chosen or places(site, site.size(ids, 1))
    rows = [site.op("Gather", words, ids), site.op("Gather", positions, chosen)]
    if segments:
        rows.append(site.op("Gather", segment_table, segments))
    norm, total = _norm_of_sum(site, rows, gamma, beta)
    return [norm, _valid_length(site, ids, mask) if site.wants(1) else "", total]


@expansion(
    "QEmbedLayerNormalization", 1, MICROSOFT, arity=(1, 18), attributes={"epsilon": (FLOAT, False)}
)
def quantized_embed_layer_normalization(site: Site) -> Sequence[str]:
    """The same with int8 tables, gamma and beta: five inputs, a mask, five scales and zero points.

    Only the rows that are looked up are dequantized.
    """
    ids, segments = site.input(0), site.input(1)
    words, positions, segment_table, gamma, beta = range(2, 7)
    _check_present(site, ids, *(site.input(i) for i in (words, positions, gamma, beta)))
    _check_segments(site, segments, site.input(segment_table))

    def floats(integers: str, index: int) -> str:
        scale, zero = site.input(index + 6), site.input(index + 11)
        if not scale:
            raise site.invalid(f"input {site.input(index)!r} has no scale")
        return str(site.op("DequantizeLinear", integers, scale, zero))

    lookups = [(words, ids), (positions, places(site, site.size(ids, 1)))]
    if segments:
        lookups.append((segment_table, segments))
    rows = [floats(site.op("Gather", site.input(i), chosen), i) for i, chosen in lookups]
    norm, _ = _norm_of_sum(site, rows, *(floats(site.input(i), i) for i in (gamma, beta)))
    return [norm, _valid_length(site, ids, site.input(7)) if site.wants(1) else ""]


def _check_present(site: Site, *required: str) -> None:
    if not all(required):
        raise site.invalid("a required input is absent")


def _check_segments(site: Site, segments: str, table: str) -> None:
    if segments and not table:
        raise site.invalid("segment ids without a segment embedding")


def _norm_of_sum(site: Site, rows: Sequence[str], gamma: str, beta: str) -> tuple[str, str]:
    """The layer norm of what ``rows`` add up to, and their sum."""
    total = reduce(lambda a, b: str(site.op("Add", a, b)), rows)
    epsilon = site.attrs.get("epsilon", _EPSILON)
    norm = site.op("LayerNormalization", total, gamma, beta, axis=-1, epsilon=epsilon)
    return norm, total


def _valid_length(site: Site, ids: str, mask: str) -> str:
    """mask_index: how many tokens the mask keeps, and zeros without a mask. -> int32 (batch,)"""
    if mask:
        kept = site.op("Cast", mask, to=TensorProto.INT32)
        return str(site.op("ReduceSum", kept, site.ints(1), keepdims=0))
    zero = Constant.of("zero", np.zeros(1, np.int32))
    return str(site.op("ConstantOfShape", site.size(ids, 0), value=zero))
