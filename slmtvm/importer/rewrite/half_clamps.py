"""Clamps that exist because float16 overflows: no part of a graph that computes in float32.

T5 clamps a layer's result to float16's whole range, or where it has infinities to a little less:
``c = where(any(isinf(x)), 64504, 65504); x = clamp(x, -c, c)``. No finite float16 is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from slmtvm.importer.graph import Array, Graph, Node
from slmtvm.importer.operators.compute import compute_quietly
from slmtvm.importer.rewrite.scope import Scope, replace_nodes

_MOST = float(np.finfo(np.float16).max)
# What "is any infinite" and the choice of a bound are made of.
_PARTS = (
    "Add", "And", "Cast", "Constant", "Equal", "Greater", "Identity", "IsInf", "Less", "Mul",
    "Neg", "Not", "Or", "ReduceMax", "ReduceSum", "Sub", "Where",
)  # fmt: skip
_DEPTH = 20  # nodes between a value and its bound


def drop_half_clamps(graph: Graph) -> Graph:
    """``graph``, still in float16, without the clamps that change none of its finite values."""
    if not any(node.op_type in ("IsInf", "If") for node in graph.nodes):
        return graph
    return replace_nodes(graph, _dropped, _PARTS)


def _dropped(node: Node, scope: Scope) -> Node:
    if node.domain or node.op_type not in ("Clip", "Max", "Min"):
        return node
    for place in range(1 if node.op_type == "Clip" else len(node.inputs)):
        x = node.inputs[place]
        others = [*node.inputs[:place], *node.inputs[place + 1 :]]
        if others and _reach_every_half(node.op_type, scope, x, others):
            return Node("", "Identity", 1, node.name, (x,), node.outputs, {})
    return node


def _reach_every_half(op_type: str, scope: Scope, x: str, bounds: Sequence[str]) -> bool:
    """Whether ``bounds``, which depend on infinities of ``x`` alone, are float16's whole range."""
    if op_type == "Clip":
        expected = [-_MOST, _MOST]
    else:
        expected = [_MOST if op_type == "Min" else -_MOST] * len(bounds)
    if len(bounds) != len(expected):
        return False
    for name, number in zip(bounds, expected, strict=True):
        bound = _Bound(scope, scope.source(x))
        value = bound.value(name, _DEPTH)
        if value is None or not bound.conditional:
            return False
        if value.dtype != np.float16 or value.size != 1 or float(value.reshape(-1)[0]) != number:
            return False
    return True


@dataclass
class _Bound:
    """A bound where ``x`` has no infinities; ``conditional``: whether it asks for these."""

    scope: Scope
    x: str
    conditional: bool = False
    _known: dict[str, Array | None] = field(default_factory=dict)

    def value(self, name: str, depth: int) -> Array | None:
        """``name``, or None where it depends on anything else."""
        if name not in self._known:
            self._known[name] = self._compute(name, depth)
        return self._known[name]

    def _compute(self, name: str, depth: int) -> Array | None:
        constant = self.scope.values(name)
        node = self.scope.producers.get(name)
        if constant is not None:
            return constant
        if node is None or node.domain or node.op_type not in _PARTS or not depth:
            return None
        if node.op_type == "IsInf":
            if self.scope.source(node.inputs[0]) != self.x:
                return None
            self.conditional = True
            return np.zeros((1, 1, 1), np.bool_)
        inputs = [self.value(i, depth - 1) for i in node.inputs]
        if any(i is None for i in inputs):
            return None
        with np.errstate(all="ignore"):
            return compute_quietly(node, inputs)
