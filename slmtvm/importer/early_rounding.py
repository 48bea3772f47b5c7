"""Roundings that come before their values are moved instead of after.

A decoder may take the batch from its own rows to reshape keys and values of the source. Only what
is moved is then the source's alone; rounded before, so are the roundings. One scale for the whole
tensor makes both orders the same.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from slmtvm.importer.compute import operator_of
from slmtvm.importer.graph import Graph, Node
from slmtvm.importer.operators import Kind

_MOVES = ("Reshape", "Squeeze", "Transpose", "Unsqueeze")


def round_before_moving(graph: Graph) -> Graph:
    """``graph`` with every rounding before the moves of what it rounds."""
    producers = {name: node for node in graph.nodes for name in node.outputs}
    # A size is that of the rounded value as well.
    readers = (node for node in graph.nodes if operator_of(node).kind is not Kind.SHAPE)
    uses = Counter(name for node in readers for name in node.inputs)
    uses.update(port.name for port in graph.outputs)
    before: dict[int, tuple[Node, Node]] = {}  # id of a move -> what comes before it
    gone: set[int] = set()
    renamed: dict[str, str] = {}
    for restore in graph.nodes:
        rounding = (
            producers.get(restore.inputs[0]) if restore.op_type == "DequantizeLinear" else None
        )
        if rounding is None or not _rounds_alike(graph, rounding, restore, uses):
            continue
        moves = _moves(rounding.inputs[0], producers, uses)
        if not moves:
            continue
        first = moves[-1]
        early = replace(rounding, inputs=(first.inputs[0], *rounding.inputs[1:]))
        before[id(first)] = early, restore
        gone |= {id(rounding), id(restore)}
        renamed[restore.outputs[0]] = rounding.inputs[0]
    nodes: list[Node] = []
    for node in graph.nodes:
        if id(node) in gone:
            continue
        inputs = tuple(renamed.get(name, name) for name in node.inputs)
        if id(node) in before:
            early, restore = before[id(node)]
            nodes += [
                replace(early, inputs=tuple(renamed.get(n, n) for n in early.inputs)),
                restore,
            ]
            inputs = (restore.outputs[0], *inputs[1:])
        nodes.append(replace(node, inputs=inputs))
    return replace(graph, nodes=tuple(nodes))


def _rounds_alike(graph: Graph, rounding: Node, restore: Node, uses: Counter[str]) -> bool:
    """Whether both nodes have the same one scale, and nothing else reads the integers."""
    constants = [graph.initializers.get(name) for name in rounding.inputs[1:]]
    return (
        rounding.op_type == "QuantizeLinear"
        and rounding.inputs[1:] == restore.inputs[1:]
        and uses[rounding.outputs[0]] == 1
        and all(c is not None and math.prod(c.shape) == 1 for c in constants)
    )


def _moves(value: str, producers: dict[str, Node], uses: Counter[str]) -> list[Node]:
    """The moves that make ``value``, the last one first, of which nothing else reads results."""
    found = []
    while uses[value] == 1 and (node := producers.get(value)) and node.op_type in _MOVES:
        found.append(node)
        value = node.inputs[0]
    return found
