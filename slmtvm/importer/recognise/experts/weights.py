"""The layers of experts: their weights, stacked, and what they make of probes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.graph import Array, Constant
from slmtvm.importer.recognise.rounding.rounding import Rounding
from slmtvm.importer.recognise.steps import ExpertWeights, Param, Weights
from slmtvm.ir.experts import Gate
from slmtvm.ir.ops import DEFAULT_ZERO_POINTS
from slmtvm.ir.params import Stack
from slmtvm.ir.reference.experts import apply_gate
from slmtvm.ir.reference.rounding import rounded
from slmtvm.ir.reference.weights import dequantize

_BYTE_LEVELS = 256
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


def float_weights(weight: Constant, where: str, turned: bool = False) -> Weights:
    """A float constant (experts, n, k), or where ``turned`` (experts, k, n), as it is stored."""
    formats = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16"}
    if weight.quantization is not None or weight.stored.dtype not in formats:
        raise UnsupportedOpError(
            f"experts' weight {weight.name!r} of {weight.stored.dtype}", where=where
        )
    array = weight.stored.swapaxes(1, 2) if turned else weight.stored
    return Weights(formats[weight.stored.dtype], Param(weight.name, array))


def stacked_weights(weight: Constant, where: str, *, turned: bool) -> ExpertWeights:
    """A float constant (experts, n, k), or where ``turned`` (experts, k, n)."""
    weights = float_weights(weight, where, turned)
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


def of_outputs(layer: ExpertWeights, parts: Sequence[slice]) -> ExpertWeights:
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
    return of_outputs(layer, (slice(half, layer.n), slice(0, half)))


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
