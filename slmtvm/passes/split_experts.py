"""moe -> route, a linear layer for each pair of token and expert, the gate, another, combine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import relax

from slmtvm.ir import expert_roundings, experts, fused, ops
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.rewrite import Rewriter, rewrite
from slmtvm.schedules.experts.points import INPUT, OF_GATE, OF_SUM


@dataclass(frozen=True)
class SplitExperts:
    """The parts are linear layers and row ops like others, which the passes that follow know."""

    name = "split-experts"

    def apply(self, model: CanonicalModel) -> CanonicalModel:
        return rewrite(model, _rule)


def _rule(call: relax.Call, rewriter: Rewriter) -> relax.Expr | None:
    if call.op != experts.MOE:
        return None
    named, routing = ops.operands(call), experts.Routing.of(call.attrs)
    routed = rewriter.emit(experts.route(named["logits"], named.get("selection_bias"), routing))
    chosen, weights = (rewriter.emit(relax.TupleGetItem(routed, i)) for i in range(2))

    def layer(name: str, x: relax.Expr, by_pair: bool) -> relax.Var:
        own = experts.ExpertLayer.of(call.attrs, f"{name}_")
        return rewriter.emit(
            experts.routed_linear(
                [x], chosen, experts.layer_operands(named, name), own,
                experts=routing.experts, by_pair=by_pair,
            )
        )  # fmt: skip

    def row(x: relax.Expr, points: tuple[str, ...], activation: str, by_pair: bool) -> relax.Var:
        roundings = expert_roundings.among(named, points)
        return rewriter.emit(
            experts.routed_row(x, chosen, roundings, activation=activation, by_pair=by_pair)
        )

    gate, x = experts.gate_of(call.attrs), call.args[0]
    own_rows = bool(expert_roundings.among(named, (INPUT,)))
    if own_rows:
        x = row(x, (INPUT,), "identity", by_pair=False)
    hidden = layer("up", x, by_pair=own_rows)
    prologue, params = _prologue(gate, rewriter)
    if expert_roundings.among(named, OF_GATE):
        hidden = row(hidden, OF_GATE, gate.activation, by_pair=True)
    elif prologue:
        hidden = rewriter.emit(fused.row(hidden, params, prologue=prologue))
    partial = layer("down", hidden, by_pair=True)
    of_sum = expert_roundings.among(named, OF_SUM)
    return experts.combine(partial, weights, chosen if of_sum else None, of_sum)


def _prologue(gate: experts.Gate, rewriter: Rewriter) -> tuple[str, list[relax.Expr]]:
    """The row op that computes the gate, and what it takes; none for the identity."""
    if gate.activation == "identity":
        return "", []
    if gate.activation != "swiglu":
        return gate.activation, []
    if gate.plain:
        return "silu_glu", []
    largest = np.finfo(np.float32).max
    numbers = [gate.alpha, gate.beta, min(gate.limit, largest)]
    label = "swiglu(" + ",".join(map(repr, numbers)) + ")"
    return "swiglu", [rewriter.add_param(label, np.array(numbers, np.float32))]
