"""Operators that route tokens to experts: the choice, scattered scores, whole mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import AttributeProto

from slmtvm.importer.graph import Array
from slmtvm.importer.operators.registry import (
    FLOAT,
    INT,
    Attrs,
    Kind,
    Shape,
    as_scalar,
    register,
)

_MICROSOFT = "com.microsoft"
_STRING = int(AttributeProto.STRING)


def _top_axes(
    attrs: Attrs, _inputs: Sequence[Any], rank: int
) -> tuple[tuple[int, ...], bool | None]:
    return (range(rank)[attrs.get("axis", -1)],), None


def _top_shapes(attrs: Attrs, shapes: Sequence[Any], constants: Sequence[Any]) -> list[Shape]:
    shape, axis = list(shapes[0]), attrs.get("axis", -1)
    count = int(as_scalar(constants[1].values()))
    if not 0 <= count <= shape[axis]:
        raise ValueError(f"the {count} largest of {shape[axis]}")
    shape[axis] = count
    return [tuple(shape)] * 2


@register(
    "TopK",
    10,
    Kind.REDUCE,
    axes=_top_axes,
    shapes=_top_shapes,
    result=lambda dtypes, _: (dtypes[0], np.dtype(np.int64)),
)
def top_k(attrs: Attrs, x: Array, k: Array) -> Any:
    """The lower index first where two are equal."""
    axis = attrs.get("axis", -1)
    keys = -x if attrs.get("largest", 1) else x
    order = np.argsort(keys, axis=axis, kind="stable")
    chosen = np.take(order, np.arange(int(as_scalar(k))), axis=axis)
    return np.take_along_axis(x, chosen, axis=axis), chosen


@register("ScatterElements", 11, Kind.SCATTER)
def scatter_elements(attrs: Attrs, x: Array, indices: Array, updates: Array) -> Any:
    places: list[Array] = list(np.indices(indices.shape, sparse=True))
    places[range(x.ndim)[attrs.get("axis", 0)]] = indices
    return _scatter(attrs, x, tuple(places), updates)


@register("ScatterND", 11, Kind.SCATTER)
def scatter_nd(attrs: Attrs, x: Array, indices: Array, updates: Array) -> Any:
    return _scatter(attrs, x, tuple(np.moveaxis(indices, -1, 0)), updates)


def _scatter(attrs: Attrs, x: Array, places: tuple[Array, ...], updates: Array) -> Array:
    reduction = attrs.get("reduction", "none")
    result = np.array(x, dtype=np.result_type(x, updates))
    if reduction == "add":
        np.add.at(result, places, updates)
    elif reduction == "none":
        result[places] = updates
    else:
        raise ValueError(f"the reduction {reduction!r} is not supported")
    return result


MOE_INPUTS = (
    "input", "router_probs", "fc1_experts_weights", "fc1_experts_bias", "fc2_experts_weights",
    "fc2_experts_bias", "fc3_experts_weights", "fc3_experts_bias",
)  # fmt: skip
QMOE_INPUTS = (
    "input", "router_probs", "fc1_experts_weights", "fc1_scales", "fc1_experts_bias",
    "fc2_experts_weights", "fc2_scales", "fc2_experts_bias", "fc3_experts_weights", "fc3_scales",
    "fc3_experts_bias", "fc1_zero_points", "fc2_zero_points", "fc3_zero_points", "router_weights",
    "fc1_global_scale", "fc2_global_scale", "fc1_act_scale", "fc2_act_scale",
    "fc1_act_block_scale", "fc2_act_block_scale",
)  # fmt: skip
_ATTRIBUTES = {
    "k": (INT, False),
    "activation_type": (_STRING, False),
    "activation_alpha": (FLOAT, False),
    "activation_beta": (FLOAT, False),
    "normalize_routing_weights": (INT, False),
    "swiglu_fusion": (INT, False),
    "swiglu_limit": (FLOAT, False),
    "use_sparse_mixer": (INT, False),
}


def _mixture_shapes(_attrs: Attrs, shapes: Sequence[Any], _constants: Sequence[Any]) -> list[Shape]:
    return [shapes[0]]


@register(
    "MoE",
    1,
    Kind.FUSED,
    _MICROSOFT,
    shapes=_mixture_shapes,
    arity=(3, len(MOE_INPUTS)),
    attributes=_ATTRIBUTES,
)
@register(
    "QMoE",
    1,
    Kind.FUSED,
    _MICROSOFT,
    shapes=_mixture_shapes,
    arity=(3, len(QMOE_INPUTS)),
    attributes={
        **_ATTRIBUTES,
        "accuracy_level": (INT, False),
        "block_size": (INT, False),
        "expert_weight_bits": (INT, False),
        "fc1_expert_weight_bits": (INT, False),
        "fc2_expert_weight_bits": (INT, False),
        "fc3_expert_weight_bits": (INT, False),
        "quant_type": (_STRING, False),
        "weights_prepacked": (INT, False),
    },
)
def mixture_of_experts(_attrs: Attrs, *_inputs: Array | None) -> Any:
    raise ValueError("a mixture of experts that reads constants alone is not supported")
