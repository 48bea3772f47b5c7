"""Softmax that is written out, as one operator again: recognisers start from it.

onnxruntime saves float16 graphs so, and some exporters write nothing else:
``e = exp(x - max(x)); e / sum(e)``, both along one axis. It is found by its nodes, not by numbers.
"""

from __future__ import annotations

from slmtvm.importer.graph import Graph, Node
from slmtvm.importer.rewrite.scope import Scope, replace_nodes

_VERSION = 13  # of ai.onnx, from which on Softmax takes one axis
_PARTS = ("Cast", "Exp", "Identity", "ReduceMax", "ReduceSum", "Reciprocal", "Sub", "Unsqueeze")


def join_softmax(graph: Graph) -> Graph:
    """``graph`` with a Softmax for each quotient that is one; its parts go, unless others read."""
    if not any(node.op_type in ("Exp", "If") for node in graph.nodes):
        return graph
    return replace_nodes(graph, _joined, _PARTS)


def _joined(node: Node, scope: Scope) -> Node:
    found = _softmax(node, scope)
    if found is None:
        return node
    x, axis = found
    return Node("", "Softmax", _VERSION, node.name, (x,), node.outputs, {"axis": axis})


def _softmax(node: Node, scope: Scope) -> tuple[str, int] | None:
    """What ``node`` is the softmax of, and along which axis; None where it is none."""
    halves = _quotient(node, scope)
    if halves is None:
        return None
    powers, total = halves
    exp = scope.producer(powers, "Exp")
    summed = _reduced(total, "ReduceSum", scope)
    if exp is None or summed is None or scope.source(summed[0]) != scope.source(powers):
        return None
    shifted = scope.producer(exp.inputs[0], "Sub")
    if shifted is None:
        return None
    x, axis = shifted.inputs[0], summed[1]
    largest = _reduced(shifted.inputs[1], "ReduceMax", scope)
    if largest is None or largest[1] != axis or scope.source(largest[0]) != scope.source(x):
        return None
    return x, axis


def _quotient(node: Node, scope: Scope) -> tuple[str, str] | None:
    """The values a and b of a / b, or of a times the reciprocal of b."""
    if node.domain or len(node.inputs) != 2:
        return None
    if node.op_type == "Div":
        return node.inputs[0], node.inputs[1]
    if node.op_type == "Mul":
        for a, b in (node.inputs, node.inputs[::-1]):
            inverse = scope.producer(b, "Reciprocal")
            if inverse is not None:
                return a, inverse.inputs[0]
    return None


def _reduced(name: str, op_type: str, scope: Scope) -> tuple[str, int] | None:
    """The operand of a reduction along one axis that keeps its place, and that axis."""
    place = scope.producer(name, "Unsqueeze")
    node = scope.producer(name if place is None else place.inputs[0], op_type)
    axis = None if node is None else _axis(node, scope)
    kept = node is not None and bool(node.attrs.get("keepdims", 1))
    if node is None or axis is None or kept != (place is None):
        return None
    return (node.inputs[0], axis) if place is None or _axis(place, scope) == axis else None


def _axis(node: Node, scope: Scope) -> int | None:
    """The one axis of a node whose axes are an attribute or the second input."""
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1:
        axes = scope.values(node.inputs[1])
    return int(axes[0]) if axes is not None and len(axes) == 1 else None
