"""Softmax that is written out, as one operator again: recognisers start from it.

onnxruntime saves float16 graphs so, and some exporters write nothing else:
``e = exp(x - max(x)); e / sum(e)``, both along one axis. It is found by its nodes, not by numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnx import TensorProto

from slmtvm.importer.graph import Constant, Graph, Node, Subgraph

_VERSION = 13  # of ai.onnx, from which on Softmax takes one axis
_PARTS = ("Cast", "Exp", "Identity", "ReduceMax", "ReduceSum", "Reciprocal", "Sub", "Unsqueeze")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def join_softmax(graph: Graph) -> Graph:
    """``graph`` with a Softmax for each quotient that is one."""
    if not any(node.op_type in ("Exp", "If") for node in graph.nodes):
        return graph
    outputs = {port.name for port in graph.outputs}
    return replace(graph, nodes=_joined(graph.nodes, outputs, graph.initializers, {}))


def _joined(
    nodes: Sequence[Node],
    outputs: Iterable[str],
    initializers: Mapping[str, Constant],
    around: Mapping[str, Node],
) -> tuple[Node, ...]:
    producers = {**around, **{name: node for node in nodes for name in node.outputs if name}}
    site = _Site(producers, initializers)
    read, kept = set(outputs), []
    for node in reversed([_node(node, site) for node in nodes]):
        # What made a quotient goes with it, where nothing else reads it.
        if node.op_type not in _PARTS or not read.isdisjoint(node.outputs):
            kept.append(node)
            read.update(node.inputs)
    return tuple(reversed(kept))


def _node(node: Node, site: _Site) -> Node:
    attrs: dict[str, Any] = {
        name: replace(
            value,
            nodes=_joined(
                value.nodes,
                value.outputs,
                {**site.initializers, **value.initializers},
                site.producers,
            ),
        )
        for name, value in node.attrs.items()
        if isinstance(value, Subgraph)
    }
    if attrs:
        return replace(node, attrs={**node.attrs, **attrs})
    found = site.softmax(node)
    if found is None:
        return node
    x, axis = found
    return Node("", "Softmax", _VERSION, node.name, (x,), node.outputs, {"axis": axis})


@dataclass(frozen=True)
class _Site:
    """The nodes and constants that a node can see."""

    producers: Mapping[str, Node]
    initializers: Mapping[str, Constant]

    def softmax(self, node: Node) -> tuple[str, int] | None:
        """What ``node`` is the softmax of, and along which axis; None where it is none."""
        halves = self._quotient(node)
        if halves is None:
            return None
        powers, total = halves
        exp = self._producer(powers, "Exp")
        summed = self._reduced(total, "ReduceSum")
        if exp is None or summed is None or self._source(summed[0]) != self._source(powers):
            return None
        shifted = self._producer(exp.inputs[0], "Sub")
        if shifted is None:
            return None
        x, axis = shifted.inputs[0], summed[1]
        largest = self._reduced(shifted.inputs[1], "ReduceMax")
        if largest is None or largest[1] != axis or self._source(largest[0]) != self._source(x):
            return None
        return x, axis

    def _quotient(self, node: Node) -> tuple[str, str] | None:
        """The values a and b of a / b, or of a times the reciprocal of b."""
        if node.domain or len(node.inputs) != 2:
            return None
        if node.op_type == "Div":
            return node.inputs[0], node.inputs[1]
        if node.op_type == "Mul":
            for a, b in (node.inputs, node.inputs[::-1]):
                inverse = self._producer(b, "Reciprocal")
                if inverse is not None:
                    return a, inverse.inputs[0]
        return None

    def _reduced(self, name: str, op_type: str) -> tuple[str, int] | None:
        """The operand of a reduction along one axis that keeps its place, and that axis."""
        place = self._producer(name, "Unsqueeze")
        node = self._producer(name if place is None else place.inputs[0], op_type)
        axis = None if node is None else self._axis(node)
        kept = node is not None and bool(node.attrs.get("keepdims", 1))
        if node is None or axis is None or kept != (place is None):
            return None
        return (node.inputs[0], axis) if place is None or self._axis(place) == axis else None

    def _axis(self, node: Node) -> int | None:
        """The one axis of a node whose axes are an attribute or the second input."""
        axes = node.attrs.get("axes")
        if axes is None and len(node.inputs) > 1:
            axes = self._integers(node.inputs[1])
        return int(axes[0]) if axes is not None and len(axes) == 1 else None

    def _integers(self, name: str) -> list[int] | None:
        constant = self.initializers.get(name)
        node = self.producers.get(name)
        if constant is None and node is not None and node.op_type == "Constant":
            constant = node.attrs.get("value")
            if "value_ints" in node.attrs:
                return list(node.attrs["value_ints"])
        if constant is None or not constant.plain or constant.dtype.kind not in "iu":
            return None
        return [int(v) for v in constant.stored.reshape(-1)]

    def _producer(self, name: str, op_type: str) -> Node | None:
        """The ``op_type`` of ai.onnx that makes ``name``, casts looked through, or None."""
        node = self.producers.get(self._source(name))
        return node if node is not None and (node.domain, node.op_type) == ("", op_type) else None

    def _source(self, name: str) -> str:
        """What ``name`` is, seen through casts between kinds of floats."""
        while (node := self.producers.get(name)) is not None:
            if node.op_type != "Identity" and not (
                node.op_type == "Cast" and node.attrs.get("to") in _FLOATS
            ):
                break
            name = node.inputs[0]
        return name
