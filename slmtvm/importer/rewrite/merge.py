"""Nodes that compute the same thing become one: exporters repeat masks and tables per layer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import onnx

from slmtvm.importer.graph import Graph, Node, attribute_key, constant_key
from slmtvm.importer.operators.compute import operator_of


def merge_duplicates(graph: Graph) -> Graph:
    """``graph`` with later copies of a node replaced by the first; outputs keep their names."""
    kept_names = {port.name for port in graph.outputs}
    kept_names.update(decision.condition for decision in graph.decisions)
    alias: dict[str, str] = {}
    first: dict[Hashable, Node] = {}
    for name, constant in graph.initializers.items():
        if constant.plain and constant.stored.size <= 1:
            original = first.setdefault(
                constant_key(constant), Node("", "Constant", 0, name, (), (name,), {})
            )
            alias[name] = original.outputs[0]
    nodes = []
    for node in graph.nodes:
        inputs = tuple(alias.get(name, name) for name in node.inputs)
        node = replace(node, inputs=inputs)
        key = (
            node.domain,
            node.op_type,
            operator_of(node).since,  # a function may be of another operator set
            inputs,
            tuple(bool(o) for o in node.outputs),
            tuple(sorted((k, attribute_key(v)) for k, v in _chosen(node).items())),
        )
        original = first.setdefault(key, node)
        if original is node or kept_names & set(node.outputs):
            nodes.append(node)
        else:
            alias.update(zip(node.outputs, original.outputs, strict=True))
    return replace(graph, nodes=tuple(nodes))


def _chosen(node: Node) -> Mapping[str, Any]:
    """The attributes of ``node`` that say something else than the operator's defaults."""
    defaults = _defaults(node.domain, node.op_type, node.version)
    return {k: v for k, v in node.attrs.items() if k not in defaults or defaults[k] != v}


@cache
def _defaults(domain: str, op_type: str, version: int) -> Mapping[str, int | float]:
    """The numbers that onnx's schema gives to absent attributes."""
    if not onnx.defs.has(op_type, version, domain):
        return {}
    attributes = onnx.defs.get_schema(op_type, version, domain).attributes
    values = {
        name: onnx.helper.get_attribute_value(attribute.default_value)
        for name, attribute in attributes.items()
        if attribute.default_value.type
    }
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}
