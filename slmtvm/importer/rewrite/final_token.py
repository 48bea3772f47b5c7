"""The row of the last end token, as classifiers of BART's kind take it, as the row of the last one.

Such a file picks rows by where a token stands (NonZero) and takes the last of them: of a sequence
that ends with that token, the last row. It computes nothing for a text without the token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from slmtvm.importer.graph import Array, Constant, Graph, Node, needed
from slmtvm.importer.rewrite.values import value_of

_LENGTH = 6  # of the sequences tried
_PLACES = ((2,), (5,), (1, 4), (0, 3, 5))  # where the token stands in each
_MAX_NODES = 12  # between the rows that are picked and the last of them
_WIDTHS = 8  # tried of rows, where the graph does not compute it


def take_final_row(graph: Graph, tokens: str) -> tuple[Graph, int | None]:
    """``graph`` with the last row in the place of that of the last token of one kind, and that
    token, with which a sequence must end; or as it is."""
    for place, node in enumerate(graph.nodes):
        if node.op_type != "GatherND":
            continue
        test = _test(graph, node.inputs[1])
        if test is None or tokens not in test.inputs:
            continue
        token = _number(graph, test, tokens)
        picked = None if token is None else _last_of(graph, place, test)
        if picked is None:
            continue
        last = f"{picked}#last"
        row = replace(
            node, op_type="Gather", inputs=(node.inputs[0], last), outputs=(picked,),
            attrs={"axis": 1},
        )  # fmt: skip
        nodes = tuple(row if picked in n.outputs else n for n in graph.nodes)
        initializers = {**graph.initializers, last: Constant.of(last, np.array(-1, np.int64))}
        kept = needed(nodes, [port.name for port in graph.outputs])
        return replace(graph, nodes=kept, initializers=initializers), token
    return graph, None


def _test(graph: Graph, places: str) -> Node | None:
    """The comparison whose true elements' ``places`` are found; None where it is no such thing."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    seen_nonzero = False
    while (node := makers.get(places)) is not None:
        if node.op_type == "Equal":
            return node if seen_nonzero else None
        if node.op_type not in ("Transpose", "NonZero", "Cast", "Identity"):
            return None
        seen_nonzero |= node.op_type == "NonZero"
        places = node.inputs[0]
    return None


def _number(graph: Graph, test: Node, tokens: str) -> int | None:
    """The one number that tokens are compared with."""
    (other,) = [name for name in test.inputs if name != tokens] or ("",)
    value = value_of(graph, other, {})
    return None if value is None or value.size != 1 else int(value.reshape(-1)[0])


def _last_of(graph: Graph, place: int, test: Node) -> str | None:
    """The value that is, of the rows which the node at ``place`` picks, the last, as (1, width)."""
    node, compared = graph.nodes[place], test.outputs[0]
    following = {node.outputs[0]}
    values: list[str] = []
    for later in graph.nodes[place + 1 :]:
        if following.intersection(later.inputs) and len(values) < _MAX_NODES:
            following.update(later.outputs)
            values.extend(later.outputs[:1])
    sizes = {c.shape[0] for c in graph.initializers.values() if len(c.shape) == 1}
    for width in (3, *sorted(sizes, reverse=True)[:_WIDTHS]):
        rows = np.random.default_rng(0).normal(size=(1, _LENGTH, width)).astype(np.float32)
        given: dict[str, Array] = {name: np.zeros((1, _LENGTH), np.int64) for name in test.inputs}
        given[node.inputs[0]] = rows
        for value in values:
            if all(_is_last(graph, value, given, compared, rows, at) for at in _PLACES):
                return value
    return None


def _is_last(
    graph: Graph,
    value: str,
    given: Mapping[str, Array],
    test: str,
    rows: Array,
    places: tuple[int, ...],
) -> bool:
    """Whether ``value`` is the last of those ``rows`` in whose ``places`` the test is true."""
    shown = np.zeros((1, _LENGTH), bool)
    shown[0, list(places)] = True
    found = value_of(graph, value, {**given, test: shown})
    wanted = rows[:, places[-1]]
    return found is not None and found.shape == wanted.shape and bool((found == wanted).all())
