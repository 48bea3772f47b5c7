"""Roundings, and products with one number, come before their values are moved instead of after.

A decoder may take the batch from its own rows to reshape keys and values of the source. Only what
is moved is then the source's alone; computed before, so is what is done to each element. One number
for the whole tensor makes both orders the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from slmtvm.importer.graph import Graph, Node

_MOVES = ("Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def compute_before_moving(graph: Graph) -> Graph:
    """``graph`` with every rounding and every product before the moves of what it is of.

    Others may read what was moved and nothing else: moves are copied, and the old ones stay.
    """
    while True:
        producers = {name: node for node in graph.nodes for name in node.outputs}
        nodes = [n for node in graph.nodes for n in _with_its_moves(graph, node, producers)]
        if len(nodes) == len(graph.nodes):
            return graph
        graph = replace(graph, nodes=tuple(nodes))


def _with_its_moves(graph: Graph, node: Node, producers: Mapping[str, Node]) -> list[Node]:
    """``node``; where it ends a rounding or is a product, all of that and then copies of the moves
    that came before it or between its parts."""
    if node.op_type in ("Mul", "Div"):
        place = _scaled(graph, node, producers)
        if place is None:
            return [node]
        parts, (moves, source) = [node], _moves(node.inputs[place], producers)
    elif node.op_type == "DequantizeLinear":
        place = 0
        between, levels = _moves(node.inputs[0], producers)
        rounding = producers.get(levels)
        if rounding is None or not _round_alike(graph, rounding, node):
            return [node]
        before, source = _moves(rounding.inputs[0], producers)
        parts, moves = [rounding, node], [*before, *between]
    else:
        return [node]
    if not moves:
        return [node]
    value, made = node.outputs[0], []
    for index, part in enumerate((*parts, *moves)):
        at = place if part is node else 0
        inputs = (*part.inputs[:at], source, *part.inputs[at + 1 :])
        source = value if index == len(parts) + len(moves) - 1 else f"{value}:early{index}"
        made.append(replace(part, inputs=inputs, outputs=(source,)))
    return made


def _scaled(graph: Graph, node: Node, producers: Mapping[str, Node]) -> int | None:
    """Which input of ``node`` it multiplies or divides by one number, the other; or None."""
    places = (0, 1) if node.op_type == "Mul" else (0,)
    for place in places:
        if _is_number(graph, node.inputs[1 - place], producers):
            return place
    return None


def _is_number(graph: Graph, value: str, producers: Mapping[str, Node]) -> bool:
    """Whether ``value`` is one constant, which may be restored from an integer."""
    node = producers.get(value)
    if node is not None and node.op_type == "DequantizeLinear":
        return all(_is_number(graph, name, producers) for name in node.inputs)
    constant = graph.initializers.get(value)
    return constant is not None and constant.shape in ((), (1,))


def _round_alike(graph: Graph, rounding: Node, restore: Node) -> bool:
    """Whether both nodes have the same one scale and zero point."""
    constants = [graph.initializers.get(name) for name in rounding.inputs[1:]]
    return (
        rounding.op_type == "QuantizeLinear"
        and rounding.inputs[1:] == restore.inputs[1:]
        and all(c is not None and math.prod(c.shape) == 1 for c in constants)
    )


def _moves(value: str, producers: Mapping[str, Node]) -> tuple[list[Node], str]:
    """The moves that make ``value``, the first one first, and what they move."""
    found: list[Node] = []
    while (node := producers.get(value)) and node.op_type in _MOVES:
        found.append(node)
        value = node.inputs[0]
    return found[::-1], value
