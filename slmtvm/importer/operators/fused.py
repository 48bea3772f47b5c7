"""Operators that are whole layers: attention, rotary embedding, a sum with its norm.

What each of them means is in ``match/``; here is what it takes and the shapes it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx import AttributeProto

from slmtvm.importer.graph import Array, Constant
from slmtvm.importer.operators.registry import FLOAT, INT, Attrs, Kind, Shape, register

_MICROSOFT = "com.microsoft"
_STRING = int(AttributeProto.STRING)

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
_COS = GROUP_QUERY_INPUTS.index("cos_cache")
_POSITIONS = GROUP_QUERY_INPUTS.index("position_ids")


def _at(values: Sequence[Any], index: int) -> Any:
    return values[index] if index < len(values) else None


def _reach(table: Constant | None, positions: Constant | None) -> int | None:
    """How many positions the rows of ``table`` serve."""
    if table is None:
        return None
    if positions is None:
        return table.shape[0]
    values = positions.values()
    last = values.size - 1 if values.size > 1 else 0
    return int(table.shape[0] - (values.max() - last))


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
    arity=(7, len(GROUP_QUERY_INPUTS)),
    optional=("key", "value", "past_key", "past_value"),
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
    raise ValueError("an attention over constants is not supported")
