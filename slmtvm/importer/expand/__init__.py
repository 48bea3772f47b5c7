"""Composite operators and branches written out in primitive nodes.

After this stage recognisers see the same few operators whatever the exporter fused. Which operator
is written out by which function is in the registry; shapes are known here, for one short length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.expand import (  # noqa: F401  (imported to fill the registry)
    attention,
    cache,
    einsum,
    embedding,
    onnx_attention,
    pointwise,
    products,
    qlinear,
    quantized,
    rotary,
)
from slmtvm.importer.expand.branch import choose_branch
from slmtvm.importer.expand.registry import find_expansion, registered_expansions
from slmtvm.importer.expand.site import Site
from slmtvm.importer.faults import located
from slmtvm.importer.freeze.freeze import advance, start
from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.freeze.roles import Roles
from slmtvm.importer.graph import Constant, Decision, Graph, Node

__all__ = ["expand", "registered_expansions"]


def expand(
    graph: Graph,
    roles: Roles,
    length: int,
    *,
    source: str = "",
    chosen: Mapping[str, bool] | None = None,
) -> Graph:
    """``graph`` without composite operators, and without an If whose condition is known.

    The condition is taken for one sequence of ``length`` tokens without a past; ``decisions`` of
    the result say what it was. ``source``: an input that holds as many tokens of another sequence.
    ``chosen``: conditions that are taken to be otherwise.
    Raises UnsupportedOpError for variants that cannot be written out.
    """
    if not any(n.op_type == "If" or _composite(n) for n in graph.nodes):
        return graph
    frozen = start(graph, roles, length)
    if source:
        frozen.shapes[source] = frozen.shapes[roles.tokens.name]
        frozen.dtypes[source] = frozen.dtypes[roles.tokens.name]
    return _Expander(frozen, roles.tokens.name, chosen or {}).run()


def _composite(node: Node) -> bool:
    return find_expansion(node.domain, node.op_type, node.version) is not None


class _Expander:
    def __init__(self, frozen: Frozen, tokens: str, chosen: Mapping[str, bool]) -> None:
        self._frozen = frozen
        self._chosen = chosen
        self._tokens = tokens
        self._graph = frozen.graph
        self._nodes: list[Node] = []
        self._decisions: list[Decision] = []
        self._initializers: dict[str, Constant] = dict(self._graph.initializers)
        names = {o for node in self._graph.nodes for o in node.outputs}
        self._names = {*names, *self._graph.initializers, *(p.name for p in self._graph.inputs)}

    def run(self) -> Graph:
        for node in self._graph.nodes:
            with located(partial(self._graph.where, node)):
                self._place(node)
        return replace(
            self._graph,
            nodes=tuple(self._nodes),
            decisions=(*self._graph.decisions, *self._decisions),
            initializers=self._initializers,
        )

    def _place(self, node: Node) -> None:
        """Add ``node``, or what it is written out as."""
        broken = any(i in self._frozen.broken for i in node.inputs)
        if node.op_type == "If" and not broken:
            self._branch(node)
        elif _composite(node):
            self._write(node)
        else:
            self._add(node)

    def _add(self, node: Node) -> None:
        advance(self._frozen, node)
        self._nodes.append(node)

    def _write(self, node: Node) -> None:
        entry = find_expansion(node.domain, node.op_type, node.version)
        assert entry is not None
        results = entry.write(Site(self._frozen, node, self._tokens, self._place))
        for index, output in enumerate(node.outputs):
            if not output:
                continue
            if index >= len(results) or not results[index]:
                raise UnsupportedOpError(
                    f"output {output!r} is not supported", where=self._graph.where(node)
                )
            self._same(results[index], output)

    def _branch(self, node: Node) -> None:
        chosen = choose_branch(self._frozen, node, self._names, self._chosen)
        if chosen is None:
            self._add(node)
            return
        self._decisions.append(chosen.decision)
        self._frozen.constants.update(chosen.initializers)
        self._initializers.update(chosen.initializers)
        for inner in chosen.nodes:
            self._place(inner)
        for inner_name, output in zip(chosen.outputs, node.outputs, strict=True):
            if output:
                self._same(inner_name, output)

    def _same(self, value: str, name: str) -> None:
        self._add(Node("", "Identity", 1, name, (value,), (name,), {}))
