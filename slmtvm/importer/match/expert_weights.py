"""The weights of experts, stacked, from the operators and products that hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.cover import Cover
from slmtvm.importer.graph import Array, Constant, Node
from slmtvm.importer.match.rounding import Rounding
from slmtvm.importer.match.weights import signed_zero_points, to_signed
from slmtvm.importer.operators.experts import MOE_INPUTS, QMOE_INPUTS
from slmtvm.importer.steps import ExpertWeights, Param, Weights
from slmtvm.ir.experts import Gate, Routing
from slmtvm.ir.ops import DEFAULT_ZERO_POINTS
from slmtvm.ir.params import Stack
from slmtvm.ir.reference.experts import apply_gate
from slmtvm.ir.reference.rounding import rounded
from slmtvm.ir.reference.weights import dequantize
from slmtvm.schedules.linear.packed_rows import unpack_rows

_ACTIVATIONS = {  # of the operators, as onnxruntime computes them
    "relu": Gate("relu"),
    "gelu": Gate("gelu_tanh"),
    "silu": Gate("silu"),
    "identity": Gate("identity"),
}
_BITS = (2, 4, 8)
_GROUPS = (256, 128, 64, 32, 16)
_BYTE_LEVELS = 256
_INT8_ACTIVATIONS = 4  # the accuracy_level that asks for them
_RANK = 8  # of stand-ins


@dataclass(frozen=True)
class Mixture:
    """The experts of one block."""

    up: ExpertWeights
    gate: Gate
    down: ExpertWeights

    @property
    def experts(self) -> int:
        return self.up.weights.weight.value.shape[0]

    def results(self, x: Array) -> Array:
        """What every expert makes of the rows of x, (experts, m, n), in float64."""
        found = []
        for expert in range(self.experts):
            hidden = apply_gate(self.gate, self.apply("up", expert, x))
            found.append(self.apply("down", expert, hidden))
        return np.stack(found)

    def apply(self, name: str, expert: int, x: Array) -> Array:
        """The layer "up" or "down" of an expert on rows of x."""
        return apply_layer(self.up if name == "up" else self.down, expert, x)


def apply_layer(layer: ExpertWeights, expert: int, x: Array) -> Array:
    """What the layer of ``expert`` makes of probes x (m, k), with its stand-in if it has one."""
    if layer.stand_in is None:
        y = x @ expanded(layer.weights, layer.k, expert).astype(x.dtype).T
    else:
        y = x @ _directions(layer.k) @ layer.stand_in[expert].T
    return np.asarray(y if layer.bias is None else y + layer.bias.array[expert])


def _directions(k: int) -> Array:
    """The same few directions for all stand-ins of k inputs, (k, few)."""
    return np.random.default_rng(k).normal(size=(k, _RANK)) / np.sqrt(k * _RANK)


def with_stand_in(layer: ExpertWeights) -> ExpertWeights:
    """``layer`` with a stand-in that no layer of another name has."""
    weight = layer.weights.weight
    seed = np.frombuffer(hashlib.sha256(weight.name.encode()).digest(), np.uint32)
    shape = (weight.value.shape[0], layer.n, _RANK)
    return replace(layer, stand_in=np.random.default_rng(seed).normal(size=shape))


def expanded(weights: Weights, k: int, expert: int) -> Array:
    """One expert's weight in float32 (n, k)."""
    weight, scales, zeros = (
        None if param is None else Stack.of(param.value).of_expert(expert)
        for param in (weights.weight, weights.scales, weights.zero_points)
    )
    assert weight is not None
    return dequantize(
        weight, scales, zeros,
        format=weights.format, group_size=weights.group_size, columns=k,
        group_channels=weights.group_channels,
    )  # fmt: skip


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
            up = _of_outputs(up, (slice(0, up.n, 2), slice(1, up.n, 2)))
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
        weights, k, activation = _float_weights(weight, where), weight.shape[2], "f32"
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


def _float_weights(weight: Constant, where: str, turned: bool = False) -> Weights:
    formats = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16"}
    if weight.quantization is not None or weight.stored.dtype not in formats:
        raise UnsupportedOpError(
            f"experts' weight {weight.name!r} of {weight.stored.dtype}", where=where
        )
    array = weight.stored.swapaxes(1, 2) if turned else weight.stored
    return Weights(formats[weight.stored.dtype], Param(weight.name, array))


def stacked_weights(weight: Constant, where: str, *, turned: bool) -> ExpertWeights:
    """A float constant (experts, n, k), or where ``turned`` (experts, k, n)."""
    weights = _float_weights(weight, where, turned)
    _, n, k = weights.weight.array.shape
    return ExpertWeights(weights, None, n, k)


def rounded_weights(
    weight: Constant, rounding: Rounding, where: str, *, turned: bool
) -> ExpertWeights:
    """A float constant as ``stacked_weights`` takes it, rounded: int8 where 8 bits hold it."""
    layer = stacked_weights(weight, where, turned=turned)
    array = layer.weights.weight.array.astype(np.float32, copy=False)
    values = rounded(array, rounding.scale, rounding.low, rounding.high)
    if rounding.high - rounding.low >= _BYTE_LEVELS:
        return replace(layer, weights=Weights("f32", Param(weight.name, values)))
    # The middle of the levels is 0 in int8.
    middle, shape = rounding.low + _BYTE_LEVELS // 2, (len(array), layer.n)
    levels = (np.rint(values / np.float32(rounding.scale)) - middle).astype(np.int8)
    zeros = np.full(shape, -middle, np.int8)
    whole = Weights(
        "int8",
        Param(weight.name, levels),
        Param(f"{weight.name}.scales", np.full(shape, rounding.scale, np.float32)),
        Param(f"{weight.name}.zero_points", zeros) if middle else None,
    )
    return replace(layer, weights=whole)


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


def _of_outputs(layer: ExpertWeights, parts: Sequence[slice]) -> ExpertWeights:
    """``layer`` with these parts of its outputs in order, which cut no block that shares scales."""
    old, size = layer.weights, layer.weights.group_channels or 1
    blocks = [slice(s.start // size, s.stop // size, s.step) for s in parts]

    def turn(param: Param | None, parts: Sequence[slice] = blocks) -> Param | None:
        if param is None:
            return None
        return Param(param.name, Stack(tuple(tuple(own[s] for s in parts) for own in param.array)))

    weight = turn(old.weight, parts)
    assert weight is not None
    weights = replace(
        old, weight=weight, scales=turn(old.scales), zero_points=turn(old.zero_points)
    )
    stand_in = layer.stand_in
    if stand_in is not None:
        stand_in = np.concatenate([stand_in[:, s] for s in parts], axis=1)
    return replace(layer, weights=weights, bias=turn(layer.bias, parts), stand_in=stand_in)


def swapped_halves(layer: ExpertWeights) -> ExpertWeights:
    """The layer with the two halves of its outputs exchanged."""
    half = layer.n // 2
    return _of_outputs(layer, (slice(half, layer.n), slice(0, half)))


def side_by_side(layers: Sequence[ExpertWeights]) -> ExpertWeights:
    """Layers of the same rows as one whose outputs lie side by side."""
    return _joined(layers, axis=1)


def stacked(layers: Sequence[ExpertWeights]) -> ExpertWeights:
    """Layers of one expert each as one of all of them."""
    return _joined(layers, axis=0)


def _zero_points_of_all(parts: Sequence[Weights]) -> list[Param | None]:
    """The zero points of each; the default ones written out where others have some."""
    known = next((p.zero_points for p in parts if p.zero_points is not None), None)
    if known is None:
        return [None for _ in parts]
    default = DEFAULT_ZERO_POINTS[parts[0].format]

    def given(weights: Weights) -> Param | None:
        assert weights.scales is not None
        shape = weights.scales.array.shape
        return weights.zero_points or Param(
            weights.weight.name, np.full(shape, default, known.array.dtype)
        )

    return [given(weights) for weights in parts]


def _joined(layers: Sequence[ExpertWeights], axis: int) -> ExpertWeights:
    first = layers[0]
    kinds = {
        (w.format, w.group_size, w.group_channels, la.activation, la.k)
        for la in layers
        for w in [la.weights]
    }
    if len(kinds) != 1 or (axis == 0 and len({la.n for la in layers}) != 1):
        raise UnsupportedOpError(f"experts in different formats: {sorted(kinds)}")

    def join(params: Sequence[Param | None]) -> Param | None:
        found = [p for p in params if p is not None]
        if not found:
            return None
        if len(found) != len(params):
            raise UnsupportedOpError(f"{found[0].name!r} has no counterpart in every expert")
        name = f"{found[0].name}..{found[-1].name}"
        stacks = [Stack.of(p.value) for p in found]
        return Param(name, Stack.side_by_side(stacks) if axis == 1 else Stack.joined(stacks))

    parts = [la.weights for la in layers]
    weight = join([p.weight for p in parts])
    assert weight is not None
    weights = Weights(
        first.weights.format, weight, join([p.scales for p in parts]),
        join(_zero_points_of_all(parts)), first.weights.group_size, first.weights.group_channels,
    )  # fmt: skip
    n = sum(la.n for la in layers) if axis == 1 else first.n
    stand_ins = [la.stand_in for la in layers if la.stand_in is not None]
    return ExpertWeights(
        weights, join([la.bias for la in layers]), n, first.k, first.activation,
        np.concatenate(stand_ins, axis=axis) if len(stand_ins) == len(layers) else None,
    )  # fmt: skip
