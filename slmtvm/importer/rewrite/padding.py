"""Places that a graph finds by the tokens that are not padding: positions, and the last token.

RoBERTa and others compute position ids as a running sum of ``ids != pad``; a decoder's classifier
finds the last token by an ArgMax of it. What is compiled runs one sequence without padding: the
comparison is taken to be false. A padding token inside a text is then a token like any other, which
the import notes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.graph import Constant, Graph, Node
from slmtvm.importer.operators import Kind, find
from slmtvm.importer.operators.compute import compute

_FINDS_PLACES = ("CumSum", "ArgMax")


@dataclass(frozen=True)
class Padding:
    """``tokens``: those that a graph takes for padding; ``tests``: the values that say where."""

    tokens: tuple[int, ...]
    tests: tuple[str, ...]


def assume_no_padding(graph: Graph, tokens: str) -> tuple[Graph, Padding]:
    """``graph`` with comparisons of ``tokens`` that find places replaced by "not padding"."""
    dependent = _dependent(graph, tokens)
    tests: dict[int, int] = {}
    for node in graph.nodes:
        if node.op_type in _FINDS_PLACES and node.inputs[0] in dependent:
            tests.update(_padding_tests(graph, node.inputs[0], dependent))
    nodes: list[Node] = []
    for place, node in enumerate(graph.nodes):
        nodes.extend(_false(node, dependent) if place in tests else [node])
    names = tuple(graph.nodes[place].outputs[0] for place in tests)
    return replace(graph, nodes=tuple(nodes)), Padding(tuple(sorted(set(tests.values()))), names)


def padding_notes(padding: tuple[int, ...]) -> Iterator[str]:
    """What was assumed of padding tokens."""
    for token in padding:
        yield (
            f"positions, or the last token, are found by tokens other than {token} (padding); what "
            f"is compiled runs sequences without padding, where token {token} counts like any other"
        )


def check_tokens_used(graph: Graph, tokens: str) -> None:
    """Raise where no output depends on the values of the input ``tokens``."""
    if not _dependent(graph, tokens).intersection(port.name for port in graph.outputs):
        raise UnsupportedOpError(
            f"no output depends on the values of the input {tokens!r}, as where two inputs were "
            "exported as one; export the model with other example values for each input",
            where=str(graph.path),
        )


def _dependent(graph: Graph, tokens: str) -> set[str]:
    """The values that depend on token ids, not only on how many there are."""
    found = {tokens}
    for node in graph.nodes:
        if _kind(node) is not Kind.SHAPE and found.intersection(node.inputs):
            found.update(filter(None, node.outputs))
    return found


def _kind(node: Node) -> Kind | None:
    """None for an operator that is written out later."""
    operator = find(node.domain, node.op_type, node.version)
    return None if operator is None else operator.kind


def _padding_tests(graph: Graph, value: str, dependent: set[str]) -> dict[int, int]:
    """place of node -> padding token, of comparisons on the way from the tokens to ``value``."""
    places = {o: i for i, n in enumerate(graph.nodes) for o in n.outputs if o in dependent}
    found: dict[int, int] = {}
    todo, seen = [value], {value}
    while todo:
        place = places.get(todo.pop())
        if place is None:
            continue  # the tokens themselves: what is summed is more than a comparison
        node = graph.nodes[place]
        pad = _compared_with(graph, node, dependent) if node.op_type == "Equal" else None
        if pad is not None:
            found[place] = pad
        elif _kind(node) in (Kind.ELEMENTWISE, Kind.MOVE):
            fresh = [i for i in node.inputs if i in dependent and i not in seen]
            seen.update(fresh)
            todo.extend(fresh)
    return found


def _compared_with(graph: Graph, node: Node, dependent: set[str]) -> int | None:
    """The one number that ``node`` compares tokens with, or None."""
    fixed = [name for name in node.inputs if name not in dependent]
    for value in _values(graph, fixed[0]) if len(fixed) == 1 else ():
        if value.size == 1 and value.dtype.kind in "iu":
            return int(value.reshape(-1)[0])
    return None


def _values(graph: Graph, name: str) -> Iterator[np.ndarray]:
    if name in graph.initializers:
        yield graph.initializers[name].values()
    for node in graph.nodes:
        if name in node.outputs and node.op_type == "Constant":
            yield compute(graph, node, ())[0]


def _false(node: Node, dependent: set[str]) -> list[Node]:
    """Nodes that give what ``node`` compares, false everywhere."""
    (compared,) = (name for name in node.inputs if name in dependent)
    shape = f"{node.outputs[0]}#shape"
    fill = Constant.of("", np.zeros(1, np.bool_))
    return [
        replace(node, op_type="Shape", inputs=(compared,), outputs=(shape,), attrs={}),
        replace(node, op_type="ConstantOfShape", inputs=(shape,), attrs={"value": fill}),
    ]
