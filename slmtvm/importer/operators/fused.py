"""Operators that are whole layers: attention, rotary embedding, a sum with its norm.

What each of them means is in ``match/``; here is what it takes and the shapes it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import AttributeProto

from slmtvm.importer.graph import Array, Constant
from slmtvm.importer.operators.registry import FLOAT, INT, Attrs, Kind, Shape, register

_MICROSOFT = "com.microsoft"
_STRING = int(AttributeProto.STRING)
_ON_CONSTANTS = "a whole layer that reads constants alone is not supported"

GROUP_QUERY_INPUTS = (
    "query",
    "key",
    "value",
    "past_key",
    "past_value",
    "seqlens_k",
    "total_sequence_length",
    "cos_cache",
    "sin_cache",
    "position_ids",
    "attention_bias",
    "head_sink",
    "k_scale",
    "v_scale",
    "q_norm_weight",
    "k_norm_weight",
)
SPARSE_INPUTS = (
    *GROUP_QUERY_INPUTS[:5],
    "block_row_indices",
    "block_col_indices",
    "total_sequence_length",
    "key_total_sequence_lengths",
    "cos_cache",
    "sin_cache",
)
_COS = GROUP_QUERY_INPUTS.index("cos_cache")
_POSITIONS = GROUP_QUERY_INPUTS.index("position_ids")


def _at(values: Sequence[Any], index: int) -> Any:
    return values[index] if index < len(values) else None


def _reach(tables: Constant | None, positions: Constant | None) -> int | None:
    """How many positions the rows of ``tables`` serve, the first of ``positions`` being 0."""
    if tables is None:
        return None
    return tables.shape[0] - (0 if positions is None else int(positions.values().flat[0]))


def _group_query_shapes(
    attrs: Attrs, shapes: Sequence[Any], _constants: Sequence[Any]
) -> list[Shape]:
    query, key, value, past = (_at(shapes, i) for i in range(4))
    heads, kv_heads = attrs["num_heads"], attrs["kv_num_heads"]
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key and value heads")
    if len(query) != 3 or (key is None) != (value is None):
        raise ValueError("queries (batch, length, features), with keys and values or neither")
    batch, length, width = query
    parts = heads + 2 * kv_heads if key is None else heads
    if width % parts or not width:
        raise ValueError(f"{width} features are not {parts} heads")
    head_dim = width // parts
    if key is not None and not key == value == (batch, length, kv_heads * head_dim):
        raise ValueError(f"{kv_heads} heads of {head_dim} keys and values are needed")
    capacity = length if past is None else max(length, past[2])
    present = (batch, kv_heads, capacity, head_dim)
    return [(batch, length, heads * head_dim), present, present]


@register(
    "GroupQueryAttention",
    1,
    Kind.FUSED,
    _MICROSOFT,
    shapes=_group_query_shapes,
    reach=lambda attrs, constants: (
        _reach(_at(constants, _COS), _at(constants, _POSITIONS))
        if attrs.get("do_rotary", 0)
        else None
    ),
    arity=(1, len(GROUP_QUERY_INPUTS)),
    attributes={
        "num_heads": (INT, True),
        "kv_num_heads": (INT, True),
        "scale": (FLOAT, False),
        "causal": (INT, False),
        "do_rotary": (INT, False),
        "rotary_interleaved": (INT, False),
        "local_window_size": (INT, False),
        "sliding_window_cache": (INT, False),
        "softcap": (FLOAT, False),
        "smooth_softmax": (INT, False),
        "qk_output": (INT, False),
        "qk_norm_epsilon": (FLOAT, False),
        "k_quant_type": (_STRING, False),
        "v_quant_type": (_STRING, False),
        "kv_cache_bit_width": (INT, False),
    },
)
def group_query_attention(_attrs: Attrs, *_inputs: Array | None) -> Any:
    raise ValueError(_ON_CONSTANTS)


def _sparse_reach(attrs: Attrs, constants: Sequence[Constant | None]) -> int | None:
    """How many positions the layouts of blocks serve, and the rotary tables where there are any."""
    rows = _at(constants, SPARSE_INPUTS.index("block_row_indices"))
    reaches = [None if rows is None else (rows.shape[-1] - 1) * attrs["sparse_block_size"]]
    if attrs.get("do_rotary", 0):
        reaches.append(_reach(_at(constants, SPARSE_INPUTS.index("cos_cache")), None))
    return min((reach for reach in reaches if reach is not None), default=None)


@register(
    "SparseAttention",
    1,
    Kind.FUSED,
    _MICROSOFT,
    shapes=_group_query_shapes,
    reach=_sparse_reach,
    arity=(1, len(SPARSE_INPUTS)),
    attributes={
        "num_heads": (INT, True),
        "kv_num_heads": (INT, True),
        "sparse_block_size": (INT, True),
        "scale": (FLOAT, False),
        "do_rotary": (INT, False),
        "rotary_interleaved": (INT, False),
    },
)
def sparse_attention(_attrs: Attrs, *_inputs: Array | None) -> Any:
    raise ValueError(_ON_CONSTANTS)


def _rotary_shapes(_attrs: Attrs, shapes: Sequence[Any], _constants: Sequence[Any]) -> list[Shape]:
    if len(shapes[0]) not in (3, 4):
        raise ValueError("(batch, length, features) or (batch, heads, length, head_dim) is needed")
    return [shapes[0]]


@register(
    "RotaryEmbedding",
    1,
    Kind.FUSED,
    _MICROSOFT,
    shapes=_rotary_shapes,
    reach=lambda _, constants: _reach(constants[2], constants[1]),
    arity=(4, 4),
    attributes={
        "num_heads": (INT, False),
        "rotary_embedding_dim": (INT, False),
        "interleaved": (INT, False),
        "is_packed_batching": (INT, False),
        "scale": (FLOAT, False),
    },
)
def rotary_embedding(_attrs: Attrs, *_inputs: Array) -> Any:
    raise ValueError(_ON_CONSTANTS)


def _skip_shapes(_attrs: Attrs, shapes: Sequence[Any], _constants: Sequence[Any]) -> list[Shape]:
    total = np.broadcast_shapes(shapes[0], shapes[1])
    if total != shapes[0] or len(total) < 2:
        raise ValueError(f"{list(shapes[1])} cannot be added to {list(shapes[0])}")
    return [total, (*total[:-1], 1), (*total[:-1], 1), total]


@register(
    "SkipSimplifiedLayerNormalization",
    1,
    Kind.FUSED,
    _MICROSOFT,
    data=2,
    shapes=_skip_shapes,
    arity=(3, 4),
    attributes={"epsilon": (FLOAT, False)},
)
@register(
    "SkipLayerNormalization",
    1,
    Kind.FUSED,
    _MICROSOFT,
    data=2,
    shapes=_skip_shapes,
    arity=(3, 5),
    attributes={"epsilon": (FLOAT, False)},
)
def skip_layer_normalization(_attrs: Attrs, *_inputs: Array | None) -> Any:
    raise ValueError(_ON_CONSTANTS)
