"""The part of a graph that may be a mixture of experts, and what it computes on chosen numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slmtvm.errors import InvalidModelError
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.evidence.regions import Override, evaluate_all
from slmtvm.importer.recognise.linear.integers import Int8Product, as_floats, int8_product


@dataclass(frozen=True)
class Block:
    """The nodes that compute ``value`` from the rows ``x``, and the logits among their results."""

    x: str
    value: str
    logits: str
    nodes: list[Node]  # those that need x or the logits, without what makes the logits
    choice: Node  # the TopK
    integers: Mapping[str, Int8Product]  # by their results: products that are of floats in nodes


def find_block(cover: Cover, value: str) -> Block | None:
    """From ``value`` back to the nearest rows that all of it depends on, a TopK in between."""
    frame = cover.frame
    makers = {o: n for n in frame.graph.nodes for o in n.outputs}
    found: dict[int, Node] = {}
    frontier = {value}
    while frontier:
        latest = max(frontier, key=lambda name: frame.order.get(name, -1))
        choices = [n for n in found.values() if n.op_type == "TopK"]
        if len(frontier) == 1 and choices and _is_rows(cover, latest):
            if len(choices) != 1:
                return None
            return _block_of(cover, latest, value, choices[0], makers)
        node = makers.get(latest)
        if node is None or (frame.small.is_lookup(node) and _by_tokens(cover, node)):
            return None
        frontier.discard(latest)
        found[frame.order[latest]] = node
        frontier.update(open_inputs(cover, node))
    return None


def _by_tokens(cover: Cover, node: Node) -> bool:
    return node.inputs[1] == cover.tokens


def _is_rows(cover: Cover, name: str) -> bool:
    frame = cover.frame
    return (
        name in frame.small.shapes
        and frame.small.dtypes[name].kind == "f"
        and cover.width(name) is not None
    )


def open_inputs(cover: Cover, node: Node) -> list[str]:
    """The inputs of ``node`` that depend on the tokens, their shapes known or not."""
    small = cover.frame.small
    return [i for i in node.inputs if i in small.shapes or i in small.broken]


def _block_of(
    cover: Cover, x: str, value: str, choice: Node, makers: Mapping[str, Node]
) -> Block | None:
    """The block between x and value, cut at the logits that ``choice`` depends on."""
    frame = cover.frame
    logits = choice.inputs[0]
    frontier = {logits}
    while frontier:
        latest = max(frontier, key=lambda name: frame.order.get(name, -1))
        node = makers.get(latest)
        if node is None or latest == x:
            return None
        scaled = node.op_type == "Mul" and int8_product(cover, latest, makers) is not None
        if scaled or operator_of(node).kind is Kind.CONTRACT:
            break
        frontier.discard(latest)
        frontier.update(open_inputs(cover, node))
    if len(frontier) != 1:
        return None
    (logits,) = frontier
    if not _is_rows(cover, logits):
        return None
    nodes: dict[int, Node] = {}
    todo = [value]
    while todo:
        name = todo.pop()
        if name in (x, logits) or frame.order[name] in nodes:
            continue
        node = makers[name]
        nodes[frame.order[name]] = node
        todo.extend(open_inputs(cover, node))
    floats, integers = as_floats(cover, [nodes[place] for place in sorted(nodes)])
    return Block(x, value, logits, floats, choice, integers)


def compute_block(
    cover: Cover, block: Block, x: Array, logits: Array, overrides: Mapping[str, Override]
) -> dict[str, Array] | None:
    """All values of the block from rows of x and of logits; None where they cannot be computed."""
    frame = cover.frame
    rows = {block.x: x, block.logits: logits}
    given = {name: frame.from_rows(name, array) for name, array in rows.items()}
    try:
        values = evaluate_all(frame.small, block.nodes, given, overrides)
    except InvalidModelError:
        return None
    if values[block.value].shape != frame.small.shapes[block.value]:
        return None
    return values


def result_rows(cover: Cover, block: Block, values: Mapping[str, Array]) -> Array:
    """The rows of the block's value among ``values``."""
    return cover.frame.to_rows(block.value, values[block.value], cover.frame.small.length)
