"""Values of a graph that is not frozen yet, computed on chosen numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slmtvm.errors import SlmError
from slmtvm.importer.graph import Array, Graph, Node, needed
from slmtvm.importer.operators import find
from slmtvm.importer.operators.compute import compute

_MAX_NODES = 400  # that a value is computed by; real ones have a few dozen


def value_of(graph: Graph, name: str, given: Mapping[str, Array]) -> Array | None:
    """The value ``name`` where ``given`` ones are known; None where it needs others, or nodes that
    cannot be computed one by one."""
    values = dict(given)
    for node in nodes_between(graph, given, name):
        operator = find(node.domain, node.op_type, node.version)
        inputs = [_known(graph, values, i) for i in node.inputs]
        absent = any(i is None and n for i, n in zip(inputs, node.inputs, strict=True))
        if absent or operator is None:
            return None
        try:
            results = compute(graph, node, inputs)
        except SlmError:
            return None
        values.update(zip(node.outputs, results, strict=False))
    return _known(graph, values, name)


def nodes_between(graph: Graph, given: Mapping[str, object], name: str) -> Sequence[Node]:
    """The nodes that compute ``name`` from ``given`` values, in order; none where they are many."""
    nodes = needed(graph.nodes, [name], given)
    return nodes if len(nodes) <= _MAX_NODES else ()


def _known(graph: Graph, values: Mapping[str, Array], name: str) -> Array | None:
    if name in values:
        return values[name]
    constant = graph.initializers.get(name)
    return None if constant is None else constant.values(table=True)
