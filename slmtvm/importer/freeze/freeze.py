"""The graph for one sequence of fixed length: constants computed, all shapes known."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.faults import located
from slmtvm.importer.freeze.fold import fold
from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.freeze.infer import MIN_ELEMENTS, infer
from slmtvm.importer.freeze.roles import Roles
from slmtvm.importer.freeze.squares import in_squares
from slmtvm.importer.graph import Constant, Graph, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import compute, nothing, operator_of

_MATRICES = 80  # length x length matrices (masks of every head) that one constant may need


def freeze(graph: Graph, roles: Roles, length: int, *, most: int | None = None) -> Frozen:
    """Specialise ``graph`` to one sequence of ``length`` tokens at position 0, without a past.

    Constants that nothing dynamic reads are dropped. ``most``: elements that a constant may have;
    what is in proportion where None. Raises InvalidModelError where shapes
    contradict each other or a constant grows out of all proportion, and UnsupportedOpError where a
    part of the graph that was left out is needed at this length.
    """
    frozen = start(graph, roles, length)
    frozen.max_elements = frozen.max_elements if most is None else most
    waiting = Counter(name for node in graph.nodes for name in set(node.inputs))
    waiting.update(port.name for port in graph.outputs)
    waiting.update(decision.condition for decision in graph.decisions)
    for node in graph.nodes:
        with located(partial(graph.where, node)):
            done = advance(frozen, node)
        if done:
            for name in set(node.inputs) - {""}:
                waiting[name] -= 1
                if waiting[name] == 0:
                    frozen.constants.pop(name, None)
    _check_declared(frozen)
    _check_decisions(frozen)
    return in_squares(frozen)


def start(graph: Graph, roles: Roles, length: int) -> Frozen:
    """``graph`` before its first node: initializers and inputs."""
    weights = sum(math.prod(c.shape) for c in graph.initializers.values())
    limit = max(MIN_ELEMENTS, _MATRICES * length * length, 2 * weights)
    frozen = Frozen(graph, length, max_elements=limit)
    frozen.constants.update(graph.initializers)
    given = roles.values(length)
    frozen.constants.update({k: Constant.of(k, v) for k, v in given.items()})
    frozen.of_sequence.update(given)
    for port in roles.by_token:
        frozen.shapes[port.name] = (1, length)
        frozen.dtypes[port.name] = np.dtype(np.int64)
    return frozen


def advance(frozen: Frozen, node: Node) -> bool:
    """Compute ``node`` or infer its shapes; whether its inputs are done with as constants."""
    reason = next((frozen.broken[i] for i in node.inputs if i in frozen.broken), None)
    if reason is None and operator_of(node).kind is Kind.BRANCH:
        reason = f"{node.label}: its condition is not known without the tokens"
    if operator_of(node).kind is Kind.SCATTER and node.inputs[0] not in frozen.broken:
        reason = None  # the result is as large as what is scattered into
    if reason is not None:
        frozen.broken.update(dict.fromkeys(filter(None, node.outputs), reason))
        return False
    if all(not i or i in frozen.constants for i in node.inputs):
        fold(frozen, node, frozen.max_elements)
        if not frozen.of_sequence.isdisjoint(node.inputs):
            frozen.of_sequence.update(filter(None, node.outputs))
    elif operator_of(node).kind is Kind.SHAPE:
        shape = frozen.shapes[node.inputs[0]]
        (value,) = compute(frozen.graph, node, [nothing(shape)])
        frozen.constants[node.outputs[0]] = Constant.of(node.outputs[0], value)
        frozen.of_sequence.add(node.outputs[0])
    else:
        infer(frozen, node, frozen.max_elements)
        return False
    return True


def truth(frozen: Frozen, name: str) -> bool | None:
    """The one boolean that ``name`` holds, or None where it is not known."""
    constant = frozen.constants.get(name)
    if constant is None or constant.dtype != np.bool_ or constant.stored.size != 1:
        return None
    return bool(constant.stored.reshape(-1)[0])


def _check_decisions(frozen: Frozen) -> None:
    for decision in frozen.graph.decisions:
        chosen = frozen.length >= decision.since
        if chosen and truth(frozen, decision.condition) != decision.outcome:
            raise UnsupportedOpError(
                f"its condition {decision.condition!r} changes with the sequence length or its "
                f"mask: it is not {decision.outcome} for {frozen.length} tokens; compile for a "
                "shorter context",
                where=decision.where,
            )


def _check_declared(frozen: Frozen) -> None:
    """The shapes that the file declares must not contradict the ones computed here.

    A declared number where the true size follows the sequence is the exporter's example length, and
    is ignored, as onnxruntime does; so are the batch and symbolic dimensions.
    """
    outputs: Mapping[str, Any] = {port.name: port for port in frozen.graph.outputs}
    for name, port in {**frozen.graph.declared, **outputs}.items():
        shape = frozen.shapes.get(name)
        if shape is None or port.dims is None:
            continue
        if len(shape) != len(port.dims):
            raise InvalidModelError(
                f"value {name!r} is declared with dimensions {list(port.dims)}, but has "
                f"{len(shape)} of them",
                where=str(frozen.graph.path),
            )
        last = port.dims[-1] if port.dims else None
        fits = not isinstance(last, int) or last == shape[-1] or shape[-1] % frozen.length == 0
        if not fits:
            raise InvalidModelError(
                f"value {name!r} is declared with dimensions {list(port.dims)}, but its operands "
                f"make it {list(shape)}",
                where=str(frozen.graph.path),
            )
