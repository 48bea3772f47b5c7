"""The operators that are mixtures of experts, MoE and QMoE: their weights and their routing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.graph import Array, Constant, Node
from slmtvm.importer.operators.experts import MOE_INPUTS, QMOE_INPUTS
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.experts.weights import (
    Mixture,
    float_weights,
    of_outputs,
    side_by_side,
    with_stand_in,
)
from slmtvm.importer.recognise.linear.weights import signed_zero_points, to_signed
from slmtvm.importer.recognise.steps import ExpertWeights, Param, Weights
from slmtvm.ir.experts import Gate, Routing
from slmtvm.schedules.linear.packed_rows import unpack_rows

_ACTIVATIONS = {  # of the operators, as onnxruntime computes them
    "relu": Gate("relu"),
    "gelu": Gate("gelu_tanh"),
    "silu": Gate("silu"),
    "identity": Gate("identity"),
}
_BITS = (2, 4, 8)
_GROUPS = (256, 128, 64, 32, 16)
_INT8_ACTIVATIONS = 4  # the accuracy_level that asks for them


def mixture_of(cover: Cover, node: Node) -> tuple[Mixture, Routing]:
    """The experts and the routing of a MoE or QMoE node.

    Raises UnsupportedOpError for variants that cannot be compiled, InvalidModelError where
    operands do not fit each other.
    """
    attrs, frame = node.attrs, cover.frame
    where = frame.graph.where(node)
    names = MOE_INPUTS if node.op_type == "MoE" else QMOE_INPUTS
    given: dict[str, Constant] = {}
    for name, value in list(zip(names, node.inputs, strict=False))[2:]:
        if value:
            constant = frame.small.constants.get(value)
            if constant is None:
                raise UnsupportedOpError(f"operand {name} must be a constant", where=where)
            given[name] = constant
    _refuse_variants(node, given, where)
    layers = {
        number: with_stand_in(_layer(node, given, number, where))
        for number in (1, 2, 3)
        if f"fc{number}_experts_weights" in given
    }
    if not {1, 2} <= layers.keys():
        raise InvalidModelError("the weights of both layers are needed", where=where)
    up, down = layers[1], layers[2]
    activation, fusion = attrs.get("activation_type", "relu"), attrs.get("swiglu_fusion", 0)
    if activation == "swiglu":
        limit = attrs.get("swiglu_limit", float("inf"))
        gate = Gate(
            "swiglu", attrs.get("activation_alpha", 1.0), attrs.get("activation_beta", 0.0), limit
        )
        if fusion == 1:
            up = of_outputs(up, (slice(0, up.n, 2), slice(1, up.n, 2)))
        elif 3 in layers:
            up = side_by_side([up, layers[3]])
    elif activation == "silu" and 3 in layers:
        gate, up = Gate("swiglu"), side_by_side([up, layers[3]])
    elif activation in _ACTIVATIONS and 3 not in layers:
        gate = _ACTIVATIONS[activation]
    else:
        raise UnsupportedOpError(
            f"experts with activation {activation!r} and {len(layers)} layers", where=where
        )
    experts = up.weights.weight.value.shape[0]
    width = up.n // 2 if gate.activation == "swiglu" else up.n
    features = frame.features(node.inputs[0])
    if up.k != features or down.k != width or down.n != features:
        raise InvalidModelError(
            f"experts of {up.k} to {up.n} and {down.k} to {down.n} features on rows of {features}",
            where=where,
        )
    top_k = attrs.get("k", 1)
    if not 0 < top_k <= experts or frame.features(node.inputs[1]) != experts:
        raise InvalidModelError(
            f"{top_k} of {experts} experts chosen by {frame.features(node.inputs[1])} numbers",
            where=where,
        )
    normalize = "sum" if attrs.get("normalize_routing_weights", 0) else "none"
    return Mixture(up, gate, down), Routing(experts, top_k, "softmax", normalize)


def _refuse_variants(node: Node, given: Mapping[str, Constant], where: str) -> None:
    found = [
        what
        for present, what in (
            (node.attrs.get("use_sparse_mixer", 0), "a sparse mixer"),
            (node.attrs.get("quant_type", "int") != "int", "float weights of 4 or 8 bits"),
            (node.attrs.get("weights_prepacked", 0) == 1, "weights packed for another device"),
            ("router_weights" in given, "weights apart from the router's choice"),
            (any("scale" in n and "_scales" not in n for n in given), "scales of activations"),
        )
        if present
    ]
    if found:
        raise UnsupportedOpError(
            f"experts with {' and '.join(found)} are not supported", where=where
        )


def _layer(node: Node, given: Mapping[str, Constant], number: int, where: str) -> ExpertWeights:
    """Layer ``number`` of the operator's experts."""
    weight = given[f"fc{number}_experts_weights"]
    bias = given.get(f"fc{number}_experts_bias")
    if len(weight.shape) != 3 or not weight.plain:
        raise InvalidModelError(
            f"weight {weight.name!r} of shape {list(weight.shape)} is not one matrix for each "
            "expert",
            where=where,
        )
    experts, n = weight.shape[:2]
    if node.op_type == "MoE":
        weights, k, activation = float_weights(weight, where), weight.shape[2], "f32"
    else:
        weights, k, activation = _quantized(node, given, number, where)
    if bias is not None and bias.shape != (experts, n):
        raise InvalidModelError(
            f"bias {bias.name!r} of shape {list(bias.shape)} where {[experts, n]} is needed",
            where=where,
        )
    given_bias = None if bias is None else bias.values().astype(np.float32, copy=False)
    if bias is None or given_bias is None or not given_bias.any():
        return ExpertWeights(weights, None, n, k, activation)
    return ExpertWeights(weights, Param(bias.name, given_bias), n, k, activation)


def _quantized(
    node: Node, given: Mapping[str, Constant], number: int, where: str
) -> tuple[Weights, int, str]:
    """The integer weights of a QMoE layer, its k and what the file asks of activations."""
    attrs = node.attrs
    bits = attrs.get(f"fc{number}_expert_weight_bits", attrs.get("expert_weight_bits", 4))
    block = attrs.get("block_size", 0)
    weight, scales = given[f"fc{number}_experts_weights"], given.get(f"fc{number}_scales")
    zeros = given.get(f"fc{number}_zero_points")
    experts, n, row_bytes = weight.shape
    k = row_bytes * 8 // bits if bits in _BITS else 0
    if not k or weight.stored.dtype != np.uint8 or scales is None:
        raise UnsupportedOpError(
            f"experts of {bits} bits in {weight.dtype}; 2, 4 and 8 bits in uint8 with scales are "
            "supported",
            where=where,
        )
    groups = -(-k // block) if block else 1
    if scales.stored.size != experts * n * groups or (block and block not in _GROUPS):
        raise InvalidModelError(
            f"scales of shape {list(scales.shape)} for {experts} experts of {n} outputs and "
            f"{groups} blocks of {block}",
            where=where,
        )
    offsets = (
        None
        if zeros is None
        else _zero_points(zeros, (experts, n), groups, bits, bool(block), where)
    )
    per_group = scales.values().reshape(experts, n, groups)
    group_size = block
    if bits < 8 and not block:
        # One scale for a channel is the same scale for each of its groups.
        group_size = next((g for g in _GROUPS if k % g == 0), _GROUPS[-1])
        times = -(-k // group_size)
        per_group = np.repeat(per_group, times, axis=2)
        offsets = None if offsets is None else np.repeat(offsets, times, axis=2)
    elif not block:
        per_group = per_group[:, :, 0]
        offsets = None if offsets is None else offsets[:, :, 0]
    stored = weight.stored
    if bits == 8:
        stored = to_signed(stored, where)
        middle = np.full((), 128, np.uint8) if offsets is None else offsets
        shifted = signed_zero_points(middle, np.dtype(np.uint8), per_group.shape)
    else:
        known = offsets is None or bool((offsets == 1 << (bits - 1)).all())
        shifted = None if known else offsets
    asked = attrs.get("accuracy_level", 0) == _INT8_ACTIVATIONS or bits == 8
    weights = Weights(
        f"int{bits}",
        Param(weight.name, stored),
        Param(scales.name, per_group),
        None if shifted is None else Param(zeros.name if zeros else weight.name, shifted),
        group_size,
    )
    return weights, k, "block" if asked and group_size else "f32"


def _zero_points(
    zeros: Constant, rows: tuple[int, int], groups: int, bits: int, in_blocks: bool, where: str
) -> Array:
    """uint8 (experts, n, groups). The file packs those of each row in bytes of their own, or where
    it has no blocks, those of all rows of an expert together."""
    experts, n = rows
    stored, count = zeros.stored.reshape(experts, -1), n * groups
    if in_blocks:
        stored, count = zeros.stored.reshape(experts * n, -1), groups
    stored = unpack_rows(stored, count, bits)
    if stored.size != experts * n * groups:
        raise InvalidModelError(f"zero points of shape {list(zeros.shape)}", where=where)
    return stored.reshape(experts, n, groups)
