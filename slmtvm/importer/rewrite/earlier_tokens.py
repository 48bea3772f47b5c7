"""Rows that are looked up by the token before each one: what the decoder of a classifier reads.

BART, T5 and their like classify a text that both halves read: the decoder gets the tokens moved by
one place, behind a token of the model or behind the text's own last one. What moves them is found
by what it does to token ids, and becomes an input of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from slmtvm.importer.graph import Array, Graph, Node, Port
from slmtvm.importer.rewrite.values import nodes_between, value_of

# What gives a table in floats: its rows are those of the stored one.
_RESTORES = {"DequantizeLinear", "Cast"}
_MOVES = ("ScatterND", "ScatterElements", "Concat", "Pad")
_LENGTHS = (5, 9)  # of the sequences tried
_LAST = -1
_TEXTS = 3  # at each length

Values = Callable[[int], Mapping[str, Array]]
"""The inputs that are no tokens, for so many of them."""


@dataclass(frozen=True)
class Earlier:
    """An input that holds the token before each one; before the first one ``first``, or the last of
    the sequence where that is negative."""

    port: Port
    first: int


@dataclass(frozen=True)
class _Text:
    """Where token ids go in, and the other inputs."""

    tokens: str
    others: Values


@dataclass(frozen=True)
class _Moved:
    """What stands before the first token, or _LAST; ``padding``: tokens that are not moved so."""

    first: int
    padding: tuple[int, ...]


def split_earlier(
    graph: Graph, tokens: Port, others: Values
) -> tuple[Graph, Earlier | None, tuple[int, ...]]:
    """``graph`` with ``tokens`` that are moved by one place as an input, that input, and the tokens
    that it takes for padding there; as it is, where nothing is looked up by such tokens."""
    text = _Text(tokens.name, others)
    found: dict[str, _Moved] = {}
    restored = {n.outputs[0]: n.inputs[0] for n in graph.nodes if n.op_type in _RESTORES}
    for node in graph.nodes:
        table = restored.get(node.inputs[0], node.inputs[0]) if node.inputs else ""
        if node.op_type == "Gather" and table in graph.initializers:
            index = node.inputs[1]
            vocab = graph.initializers[table].shape[0]
            if index not in found and _moves(graph, tokens.name, index):
                moved = _moved(graph, text, index, vocab)
                if moved is not None:
                    found[index] = moved
    firsts = {moved.first for moved in found.values()}
    if len(firsts) != 1:
        return graph, None, ()
    port = Port(f"{tokens.name}#earlier", tokens.elem_type, tokens.dims)
    names = dict.fromkeys(found, port.name)
    nodes = tuple(
        replace(n, inputs=tuple(names.get(i, i) for i in n.inputs)) if n.op_type == "Gather" else n
        for n in graph.nodes
    )
    changed = replace(graph, nodes=nodes, inputs=(*graph.inputs, port))
    padding = sorted({token for moved in found.values() for token in moved.padding})
    return changed, Earlier(port, firsts.pop()), tuple(padding)


def _moves(graph: Graph, tokens: str, value: str) -> bool:
    """Whether ``value`` may hold tokens at other places."""
    nodes = nodes_between(graph, {tokens: None}, value)
    read = {name for node in nodes for name in node.inputs}
    return tokens in read and any(node.op_type in _MOVES for node in nodes)


def _moved(graph: Graph, source: _Text, value: str, vocab: int) -> _Moved | None:
    """What ``value`` makes of token ids below ``vocab``, where that is to move them by one."""
    random = np.random.default_rng(0)
    special = sorted(_small_numbers(graph, source, value, vocab))
    usual = np.setdiff1d(np.arange(vocab), special)
    if usual.size < max(_LENGTHS):
        return None
    firsts = {_LAST, *range(vocab)}
    for length in _LENGTHS:
        for _ in range(_TEXTS):
            ids = random.choice(usual, length, replace=False)
            firsts &= _first(graph, source, value, ids)
    if len(firsts) != 1:
        return None
    (first,) = firsts
    ids = random.choice(usual, _LENGTHS[0], replace=False)
    padding = []
    for token in special:
        texts = (np.where(np.arange(ids.size) == at, token, ids) for at in range(ids.size))
        if any(first not in _first(graph, source, value, text) for text in texts):
            padding.append(token)
    return _Moved(first, tuple(padding))


def _first(graph: Graph, source: _Text, value: str, ids: Array) -> set[int]:
    """What may stand before the first of tokens (n,) that ``value`` moves by one; none where it
    does something else to them."""
    given = {**source.others(ids.size), source.tokens: ids[None].astype(np.int64)}
    found = value_of(graph, value, given)
    if found is None or found.shape != (1, ids.size) or found.dtype.kind not in "iu":
        return set()
    row = found[0]
    if (row[1:] != ids[:-1]).any():
        return set()
    return {int(row[0]), _LAST} if row[0] == ids[-1] else {int(row[0])}


def _small_numbers(graph: Graph, source: _Text, value: str, vocab: int) -> Iterator[int]:
    """The numbers below ``vocab`` that ``value`` is computed with: one may be compared with
    tokens."""
    given: Mapping[str, object] = {**source.others(1), source.tokens: None}
    found: set[int] = set()
    for node in nodes_between(graph, given, value):
        for array in _constants(graph, node):
            if array.dtype.kind in "iu" and array.size == 1:
                found.add(int(array.reshape(-1)[0]))
    yield from (number for number in found if 0 <= number < vocab)


def _constants(graph: Graph, node: Node) -> Iterator[Array]:
    if node.op_type == "Constant":
        value = value_of(graph, node.outputs[0], {})
        if value is not None:
            yield value
    for name in node.inputs:
        if name in graph.initializers:
            yield graph.initializers[name].values()
