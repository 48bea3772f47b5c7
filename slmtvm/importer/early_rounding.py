"""Roundings that come before their values are moved instead of after.

A decoder may take the batch from its own rows to reshape keys and values of the source. Only what
is moved is then the source's alone; rounded before, so are the roundings. One scale for the whole
tensor makes both orders the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from slmtvm.importer.graph import Graph, Node

_MOVES = ("Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def round_before_moving(graph: Graph) -> Graph:
    """``graph`` with every rounding before the moves of what it rounds.

    Others may read what was moved and not rounded: moves are copied, and the old ones stay.
    """
    while True:
        producers = {name: node for node in graph.nodes for name in node.outputs}
        nodes = [n for node in graph.nodes for n in _with_its_moves(graph, node, producers)]
        if len(nodes) == len(graph.nodes):
            return graph
        graph = replace(graph, nodes=tuple(nodes))


def _with_its_moves(graph: Graph, node: Node, producers: Mapping[str, Node]) -> list[Node]:
    """``node``; in the place of a DequantizeLinear, the whole rounding and then copies of the moves
    that came between its parts and before it, since the rounding before."""
    if node.op_type != "DequantizeLinear":
        return [node]
    moves, levels = _moves(node.inputs[0], producers)
    rounding = producers.get(levels)
    if rounding is None or not _round_alike(graph, rounding, node):
        return [node]
    earlier, source = _moves(rounding.inputs[0], producers)
    moves = [*earlier, *moves]
    if not moves:
        return [node]
    value = node.outputs[0]
    names = [f"{value}:moved{i}" for i in range(len(moves))]
    made = [
        replace(rounding, inputs=(source, *rounding.inputs[1:]), outputs=(f"{value}:levels",)),
        replace(node, inputs=(f"{value}:levels", *node.inputs[1:]), outputs=(names[0],)),
    ]
    for move, before, after in zip(moves, names, [*names[1:], value], strict=True):
        made.append(replace(move, inputs=(before, *move.inputs[1:]), outputs=(after,)))
    return made


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
