"""Nodes of a graph, its branches included, replaced one by one by what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import TensorProto

from slmtvm.importer.graph import Array, Constant, Graph, Node, Subgraph
from slmtvm.importer.operators.elementwise import constant_attribute

_SMALL = 64  # elements of a constant that is looked at
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True)
class Scope:
    """The nodes and constants that a node can see: its own graph's, and those around a branch."""

    producers: Mapping[str, Node]
    initializers: Mapping[str, Constant]

    def producer(self, name: str, op_type: str) -> Node | None:
        """The ``op_type`` of ai.onnx that makes ``name``, casts looked through, or None."""
        node = self.producers.get(self.source(name))
        return node if node is not None and (node.domain, node.op_type) == ("", op_type) else None

    def source(self, name: str) -> str:
        """What ``name`` is, seen through casts between kinds of floats."""
        while (node := self.producers.get(name)) is not None:
            if node.op_type != "Identity" and not (
                node.op_type == "Cast" and node.attrs.get("to") in _FLOATS
            ):
                break
            name = node.inputs[0]
        return name

    def values(self, name: str) -> Array | None:
        """A small constant, as the file holds it; None for what is none."""
        held: Constant | Array | None = self.initializers.get(name)
        node = self.producers.get(name)
        if held is None and node is not None and node.op_type == "Constant":
            try:
                held = constant_attribute(node.attrs)
            except ValueError:  # a text, or nothing
                return None
        if isinstance(held, Constant):
            held = held.stored if held.plain else None
        return held if held is not None and held.size <= _SMALL else None


Rule = Callable[[Node, Scope], Node]


def replace_nodes(graph: Graph, rule: Rule, parts: Container[str]) -> Graph:
    """``graph`` with what ``rule`` gives for each node, which has the same outputs.

    Nodes whose op_type is in ``parts`` go where nothing reads them.
    """
    outputs = [port.name for port in graph.outputs]
    scope = Scope({}, graph.initializers)
    return replace(graph, nodes=_replaced(graph.nodes, outputs, scope, rule, parts))


def _replaced(
    nodes: Sequence[Node],
    outputs: Iterable[str],
    around: Scope,
    rule: Rule,
    parts: Container[str],
) -> tuple[Node, ...]:
    own = {name: node for node in nodes for name in node.outputs if name}
    producers = {**around.producers, **own}
    scope = Scope(producers, around.initializers)
    found = []
    for node in nodes:
        bodies = {
            name: _in_branch(value, scope, rule, parts)
            for name, value in node.attrs.items()
            if isinstance(value, Subgraph)
        }
        new = replace(node, attrs={**node.attrs, **bodies}) if bodies else rule(node, scope)
        found.append(new)
        # Those after it see what it became.
        producers.update({name: new for name in node.outputs if name})
    read, kept = set(outputs), []
    for node in reversed(found):
        if node.op_type not in parts or not read.isdisjoint(node.outputs):
            kept.append(node)
            read.update(node.inputs)
    return tuple(reversed(kept))


def _in_branch(body: Subgraph, around: Scope, rule: Rule, parts: Container[str]) -> Subgraph:
    scope = Scope(around.producers, {**around.initializers, **body.initializers})
    return replace(body, nodes=_replaced(body.nodes, body.outputs, scope, rule, parts))
