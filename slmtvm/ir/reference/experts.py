"""Mixtures of experts."""

from __future__ import annotations

import numpy as np

from slmtvm.ir import experts
from slmtvm.ir.reference.arrays import Array, Attrs
from slmtvm.ir.reference.elementwise import ELEMENTWISE, sigmoid, softmax
from slmtvm.ir.reference.layers import linear


def choose_experts(
    logits: Array, bias: Array | None, routing: experts.Routing
) -> tuple[Array, Array]:
    """The experts of each row of logits (m, experts) and their weights, both (m, top_k)."""
    if routing.score == "softmax":
        scores = softmax(logits)
    else:
        scores = sigmoid(logits) if routing.score == "sigmoid" else logits
    by = scores if bias is None else scores + bias
    chosen = np.argsort(-by, axis=1, kind="stable")[:, : routing.top_k]
    weights = np.take_along_axis(scores, chosen, axis=1)
    if routing.normalize == "sum":
        weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(routing.eps))
    elif routing.normalize == "softmax":
        weights = softmax(weights)
    return chosen, np.asarray(weights * np.float32(routing.scale))


def apply_gate(gate: experts.Gate, x: Array) -> Array:
    """What lies between the two layers of an expert, on rows of x."""
    if gate.activation == "identity":
        return x
    if gate.activation != "swiglu":
        return np.asarray(ELEMENTWISE[f"relax.nn.{gate.activation.removesuffix('_erf')}"](x))
    half = x.shape[1] // 2
    g = np.minimum(x[:, :half], np.float32(gate.limit))
    linear = np.clip(x[:, half:], -np.float32(gate.limit), np.float32(gate.limit))
    return np.asarray(g * sigmoid(np.float32(gate.alpha) * g) * (linear + np.float32(gate.beta)))


def moe(x: Array, attrs: Attrs, _kind: str, logits: Array, **named: Array) -> Array:
    routing, gate = experts.Routing.of(attrs), experts.gate_of(attrs)
    chosen, weights = choose_experts(logits, named.get("selection_bias"), routing)
    layers = {name: experts.ExpertLayer.of(attrs, f"{name}_") for name in ("up", "down")}
    y = np.zeros((len(x), layers["down"].n), np.float32)
    for expert in range(routing.experts):
        rows, slots = np.nonzero(chosen == expert)
        if not rows.size:
            continue

        def apply(name: str, h: Array, expert: int = expert) -> Array:
            own = {k: v[expert] for k, v in experts.layer_operands(named, name).items()}
            return linear(h, vars(layers[name]), "decoder", **own)

        part = apply("down", apply_gate(gate, apply("up", x[rows])))
        np.add.at(y, rows, part * weights[rows, slots, None])
    return y
