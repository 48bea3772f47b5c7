"""Embedding layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

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
    gamma, beta, mask, places = (site.input(i) for i in range(5, 9))
    if not all((ids, words, positions, gamma, beta)):
        raise site.invalid("a required input is absent")
    if not places:
        begin, step = site.constant(0, np.int64), site.constant(1, np.int64)
        length = site.op("Squeeze", site.size(ids, 1))
        places = site.op("Range", begin, length, step)
    total = site.op("Add", site.op("Gather", words, ids), site.op("Gather", positions, places))
    if segments:
        if not segment_table:
            raise site.invalid("segment ids without a segment embedding")
        total = site.op("Add", total, site.op("Gather", segment_table, segments))
    epsilon = site.attrs.get("epsilon", _EPSILON)
    norm = site.op("LayerNormalization", total, gamma, beta, axis=-1, epsilon=epsilon)
    return [norm, _valid_length(site, ids, mask) if site.wants(1) else "", total]


def _valid_length(site: Site, ids: str, mask: str) -> str:
    """mask_index: how many tokens the mask keeps, and zeros without a mask. -> int32 (batch,)"""
    if mask:
        kept = site.op("Cast", mask, to=TensorProto.INT32)
        return str(site.op("ReduceSum", kept, site.ints(1), keepdims=0))
    zero = Constant.of("zero", np.zeros(1, np.int32))
    return str(site.op("ConstantOfShape", site.size(ids, 0), value=zero))
