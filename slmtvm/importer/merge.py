"""Nodes that compute the same thing become one: exporters repeat masks and tables per layer."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from slmtvm.importer.graph import Constant, Graph, Node

_SMALL = 64  # elements; larger constants are compared by identity


def merge_duplicates(graph: Graph) -> Graph:
    """``graph`` with later copies of a node replaced by the first; outputs keep their names."""
    kept_names = {port.name for port in graph.outputs}
    kept_names.update(decision.condition for decision in graph.decisions)
    alias: dict[str, str] = {}
    first: dict[Hashable, Node] = {}
    for name, constant in graph.initializers.items():
        if constant.plain and constant.stored.size <= 1:
            original = first.setdefault(
                _constant_key(constant), Node("", "Constant", 0, name, (), (name,), {})
            )
            alias[name] = original.outputs[0]
    nodes = []
    for node in graph.nodes:
        inputs = tuple(alias.get(name, name) for name in node.inputs)
        node = replace(node, inputs=inputs)
        key = (
            node.domain,
            node.op_type,
            inputs,
            tuple(bool(o) for o in node.outputs),
            tuple(sorted((k, _attribute_key(v)) for k, v in node.attrs.items())),
        )
        original = first.setdefault(key, node)
        if original is node or kept_names & set(node.outputs):
            nodes.append(node)
        else:
            alias.update(zip(node.outputs, original.outputs, strict=True))
    return replace(graph, nodes=tuple(nodes))


def _attribute_key(value: Any) -> Hashable:
    if isinstance(value, Constant):
        return _constant_key(value)
    # 1 and 1.0 are equal keys in Python; an attribute of another type is another attribute.
    return (type(value).__name__, value)


def _constant_key(value: Constant) -> Hashable:
    if value.stored.size > _SMALL or value.packed is not None:
        return ("tensor", id(value))
    return ("tensor", str(value.dtype), value.shape, value.stored.tobytes())
