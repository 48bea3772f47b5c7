"""The branch of an If that is taken, as nodes of the graph around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from slmtvm.errors import InvalidModelError
from slmtvm.importer.freeze.freeze import truth
from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.graph import Constant, Decision, Node, Subgraph


@dataclass(frozen=True)
class Branch:
    """``nodes`` make ``outputs``, one for each output of the If."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    initializers: Mapping[str, Constant]
    decision: Decision


def choose_branch(
    frozen: Frozen, node: Node, taken: set[str], chosen: Mapping[str, bool]
) -> Branch | None:
    """The branch of the If ``node`` that its condition chooses, or None where that is not known.

    ``chosen`` says of some known conditions what they are taken to be.
    Values of the branch whose names are ``taken`` get others; all its names are then taken.
    """
    where = frozen.graph.where(node)
    outcome = truth(frozen, node.inputs[0])
    if outcome is None:
        return None
    outcome = chosen.get(node.inputs[0], outcome)
    body: Subgraph = node.attrs["then_branch" if outcome else "else_branch"]
    if len(body.outputs) != len(node.outputs):
        raise InvalidModelError(
            f"a branch has {len(body.outputs)} outputs, the node {len(node.outputs)}", where=where
        )
    names = _names(body, taken, f"{node.name or node.outputs[0]}/")
    return Branch(
        tuple(_renamed(inner, names) for inner in body.nodes),
        tuple(names.get(o, o) for o in body.outputs),
        {names[name]: replace(c, name=names[name]) for name, c in body.initializers.items()},
        Decision(node.inputs[0], outcome, where),
    )


def _names(body: Subgraph, taken: set[str], prefix: str) -> dict[str, str]:
    """New names of all values that ``body`` defines; most keep their own."""
    names: dict[str, str] = {}
    for name in (*body.initializers, *(o for node in body.nodes for o in node.outputs if o)):
        new = name
        while new in taken:
            new = prefix + new
        taken.add(new)
        names[name] = new
    return names


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    attrs = {
        key: _renamed_captures(value, names) if isinstance(value, Subgraph) else value
        for key, value in node.attrs.items()
    }
    return replace(
        node,
        inputs=tuple(names.get(i, i) for i in node.inputs),
        outputs=tuple(names.get(o, o) for o in node.outputs),
        attrs=attrs,
    )


def _renamed_captures(body: Subgraph, names: Mapping[str, str]) -> Subgraph:
    """``body`` with what it captures renamed; its own names stay and hide outer ones."""
    own = {*body.initializers, *(o for node in body.nodes for o in node.outputs)}
    outer = {old: new for old, new in names.items() if old not in own}
    return replace(
        body,
        nodes=tuple(_renamed(inner, outer) for inner in body.nodes),
        outputs=tuple(outer.get(o, o) for o in body.outputs),
        captured=tuple(outer.get(c, c) for c in body.captured),
    )
