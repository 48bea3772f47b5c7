"""Mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from slmtvm.ir import expert_roundings, experts
from slmtvm.ir.reference.arrays import Array, Attrs
from slmtvm.ir.reference.elementwise import ELEMENTWISE, sigmoid, softmax
from slmtvm.ir.reference.layers import linear
from slmtvm.ir.reference.rounding import rounded
from slmtvm.schedules.experts.points import Levels

Round = Callable[[str, Array], Array]
"""A value as the rounding of its point makes it."""
Layer = Callable[[str, int, Array], Array]
"""The layer "up" or "down" of an expert on rows."""


def rounding_by(levels: Mapping[str, Levels]) -> Round:
    """Rounds at the points that have ``levels``."""
    return lambda point, x: rounded(x, *levels[point]) if point in levels else x


def choose_experts(
    logits: Array, bias: Array | None, routing: experts.Routing, at: Round | None = None
) -> tuple[Array, Array]:
    """The experts of each row of logits (m, experts) and their weights, both (m, top_k).

    ``at`` stands for the roundings of ``routing`` where it is given.
    """
    at = at or rounding_by(expert_roundings.parse(routing.roundings))
    if routing.score == "softmax":
        scores = softmax(logits)
    else:
        scores = sigmoid(logits) if routing.score == "sigmoid" else logits
    scores = at("scores", scores)
    by = at("selection", scores if bias is None else scores + bias)
    chosen = np.argsort(-by, axis=1, kind="stable")[:, : routing.top_k]
    weights = np.take_along_axis(scores, chosen, axis=1)
    if routing.normalize == "sum":
        total = at("sum", weights.sum(axis=1, keepdims=True))
        weights = weights / at("divisor", total + np.float32(routing.eps))
    elif routing.normalize == "softmax":
        weights = softmax(weights)
    return chosen, np.asarray(weights * np.float32(routing.scale))


def apply_gate(gate: experts.Gate, x: Array, at: Round = lambda _, x: x) -> Array:
    """What lies between the two layers of an expert, on rows of x."""
    if gate.activation != "swiglu":
        x = at("up", x)
        if gate.activation == "silu":
            return at("hidden", x * at("sigmoid", sigmoid(x)))
        if gate.activation == "identity":
            return at("hidden", x)
        function = ELEMENTWISE[f"relax.nn.{gate.activation.removesuffix('_erf')}"]
        return at("hidden", np.asarray(function(x)))
    half = x.shape[1] // 2
    g = at("gate", np.minimum(x[:, :half], np.float32(gate.limit)))
    linear = np.clip(x[:, half:], -np.float32(gate.limit), np.float32(gate.limit))
    activated = at("activation", g * at("sigmoid", sigmoid(np.float32(gate.alpha) * g)))
    return at("hidden", activated * (at("up", linear) + np.float32(gate.beta)))


def mix(
    x: Array,
    chosen: Array,
    weights: Array,
    layer: Layer,
    gate: experts.Gate,
    n: int,
    at: Sequence[Round],
) -> Array:
    """What the experts ``chosen`` (m, top_k) make of rows of x, times weights: (m, n).

    at: the roundings of each expert.
    """
    y = np.zeros((len(x), n), x.dtype)
    for expert, own in enumerate(at):
        y = own("total", y)
        rows, slots = np.nonzero(chosen == expert)
        if not rows.size:
            continue
        hidden = apply_gate(gate, layer("up", expert, own("input", x[rows])), own)
        part = own("down", layer("down", expert, hidden))
        weighted = own("weighted", part * own("weight", weights[rows, slots, None]))
        np.add.at(y, rows, weighted)
    return y


def roundings_of(tables: Mapping[str, Array], count: int) -> list[Round]:
    """The roundings of ``count`` experts; tables: (experts, 3) as ``ir.experts.moe`` has them."""
    return [
        rounding_by({point: tuple(table[expert]) for point, table in tables.items()})
        for expert in range(count)
    ]


def moe(x: Array, attrs: Attrs, _kind: str, logits: Array, **named: Array) -> Array:
    routing, gate = experts.Routing.of(attrs), experts.gate_of(attrs)
    chosen, weights = choose_experts(logits, named.get("selection_bias"), routing)
    layers = {name: experts.ExpertLayer.of(attrs, f"{name}_") for name in ("up", "down")}

    def apply(name: str, expert: int, h: Array) -> Array:
        own = {k: v[expert] for k, v in experts.layer_operands(named, name).items()}
        return linear(h, vars(layers[name]), "decoder", **own)

    at = roundings_of(expert_roundings.among(named), routing.experts)
    return mix(x, chosen, weights, apply, gate, layers["down"].n, at)
