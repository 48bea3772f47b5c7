"""How a mixture of experts rounds with constant scales, found by the numbers that are rounded.

The block is computed without roundings, and what a QuantizeLinear takes are the same numbers as
those of one of the points that ``slm.moe`` can round at. Then the block is computed with its
roundings, and the experts with those that were found: both must agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.evidence.regions import Override
from slmtvm.importer.recognise.experts.block import Block, compute_block, open_inputs, result_rows
from slmtvm.importer.recognise.experts.places import (
    LOGITS,
    PICKED,
    PRODUCT,
    SAME,
    Choice,
    Place,
    X,
    find_places,
)
from slmtvm.importer.recognise.rounding.rounding import Rounding, rounding_of, rounding_override
from slmtvm.ir.reference.experts import choose_experts, mix, rounding_by, roundings_of
from slmtvm.ir.reference.rounding import rounded
from slmtvm.schedules.experts.points import (
    BEFORE_GATE,
    INPUT,
    POINTS,
    ROUTING_POINTS,
    TOTAL,
    WEIGHTED,
    Levels,
)


@dataclass(frozen=True)
class Roundings:
    """Those of the block: of its rows and logits as they come, of the routing and of the experts.

    ``tables``: float32 (experts, 3) for each point, as ``ir.experts.moe`` has them.
    """

    x: Rounding | None = None
    logits: Rounding | None = None
    routing: Mapping[str, Levels] = field(default_factory=dict)
    tables: Mapping[str, Array] = field(default_factory=dict)


def find_roundings(
    cover: Cover,
    block: Block,
    choice: Choice,
    overrides: Mapping[str, Override],
    draw: Iterable[tuple[Array, Array]],
) -> Roundings:
    """The roundings of ``block`` that are not among ``overrides``.

    ``draw``: rows and logits with which each expert takes part. Raises UnsupportedOpError where
    values are rounded that ``slm.moe`` does not round.
    """
    every = [n for n in block.nodes if n.op_type == "QuantizeLinear" and open_inputs(cover, n)]
    given = {n.outputs[0]: rounding_of(cover, n) for n in every}
    _check_restored(cover, block, given)
    live = _live(block)
    quantizers = [n for n in every if n.outputs[0] in live and n.outputs[0] not in overrides]
    if not quantizers:
        return Roundings()
    probes = list(draw)
    places = find_places(cover, block, choice, overrides, probes, quantizers)
    found = _Assignment(cover, quantizers, given, places).result(
        choice.mixture.experts, _own_rounding(cover, block)
    )
    really = {name: rounding_override(rounding) for name, rounding in given.items()}
    if not _agree(cover, block, choice, {**really, **overrides}, probes, found):
        raise refusal(cover, quantizers[0], "in an order that is not supported")
    return found


def refusal(cover: Cover, node: Node, what: str) -> UnsupportedOpError:
    """The error for a rounding ``node`` of a mixture of experts."""
    return UnsupportedOpError(
        f"rounds activations of experts with a constant scale {what}; leave out the experts and "
        "what chooses them when quantizing",
        where=cover.frame.graph.where(node),
    )


def _live(block: Block) -> set[str]:
    """The values, not only the shapes, that the block's result depends on."""
    makers = {o: n for n in block.nodes for o in n.outputs}
    seen: set[str] = set()
    todo = [block.value]
    while todo:
        name = todo.pop()
        node = makers.get(name)
        if node is not None and name not in seen:
            seen.add(name)
            todo.extend(() if operator_of(node).kind is Kind.SHAPE else node.inputs)
    return seen


def _check_restored(cover: Cover, block: Block, given: Mapping[str, Rounding]) -> None:
    """Raise where integers are read with another scale than they were made with, or changed."""
    of = dict(given)
    for node in block.nodes:
        if node.op_type == "DequantizeLinear" and open_inputs(cover, node):
            if of.get(node.inputs[0]) != rounding_of(cover, node):
                raise refusal(cover, node, "and restores them with another")
            continue
        sources = {of[name] for name in node.inputs if name in of}
        if not sources or operator_of(node).kind is Kind.SHAPE:
            continue
        others = [i for i in open_inputs(cover, node) if i not in of]
        if len(sources) != 1 or operator_of(node).kind is not Kind.MOVE or (
            operator_of(node).data is None and others
        ):  # fmt: skip
            raise refusal(cover, node, "and computes with the integers")
        of.update(dict.fromkeys(node.outputs, sources.pop()))


def _own_rounding(cover: Cover, block: Block) -> Rounding | None:
    """How the block's rows are rounded before they come to it."""
    frame = cover.frame
    restored = frame.producers.get(cover.moved(block.x)[0])
    if restored is None or restored.op_type != "DequantizeLinear":
        return None
    quantizer = frame.producers.get(cover.moved(restored.inputs[0])[0])
    rounds = quantizer is not None and quantizer.op_type == "QuantizeLinear"
    return rounding_of(cover, restored) if rounds else None


@dataclass
class _Assignment:
    """Which rounding is at which place."""

    cover: Cover
    quantizers: Sequence[Node]
    given: Mapping[str, Rounding]
    places: Mapping[str, tuple[Place, ...]]
    _at: dict[Place, Rounding] = field(default_factory=dict)
    _nodes: dict[Place, Node] = field(default_factory=dict)

    def result(self, experts: int, own: Rounding | None) -> Roundings:
        """``own``: how the block's rows were rounded before."""
        groups: dict[tuple[Place, ...], list[Node]] = {}
        for node in self.quantizers:
            if node.outputs[0] not in self.places:
                continue
            places = self.places[node.outputs[0]]
            if not places:
                raise refusal(self.cover, node, "at a place where that is not supported")
            groups.setdefault(places, []).append(node)
        for places, nodes in groups.items():
            # Rounding again what was rounded in the same way changes nothing.
            last = self._before(places[0], own)
            chain: list[Node] = []
            for node in nodes:
                if self.given[node.outputs[0]] != last:
                    chain.append(node)
                last = self.given[node.outputs[0]]
            if len(chain) > len(places):
                raise refusal(self.cover, chain[len(places)], "twice")
            for place, node in zip(places, chain, strict=False):
                self._at[place], self._nodes[place] = self.given[node.outputs[0]], node
        if (PICKED, None) in self._at:
            raise refusal(self.cover, self._nodes[PICKED, None], "that others are not rounded with")
        routing = {p: _levels(self._at[p, None]) for p in ROUTING_POINTS if (p, None) in self._at}
        x, logits = (self._at.get((point, None)) for point in (X, LOGITS))
        return Roundings(x, logits, routing, self._tables(experts, x or own))

    def _before(self, place: Place, own: Rounding | None) -> Rounding | None:
        """How what comes to a place was rounded before, as far as that is known."""
        point, expert = place
        if point == INPUT:
            return self._at.get((X, None), own)
        if point == PICKED:
            return self._at.get(("scores", None))
        if point in BEFORE_GATE:
            return self._product(expert)
        return own if point == X else None

    def _product(self, expert: int | None) -> Rounding | None:
        """How both halves of a gated layer's product are rounded together."""
        return self._at.get((PRODUCT, expert), self._at.get((PRODUCT, None)))

    def _tables(self, experts: int, own: Rounding | None) -> dict[str, Array]:
        self._tell_totals(experts)
        tables: dict[str, Array] = {}
        for point in POINTS:
            every = self._at.get((point, None))
            found = [self._at.get((point, e), every) for e in range(experts)]
            if point == INPUT:
                found = [r or own for r in found] if any(found) else found
            if point in BEFORE_GATE:
                both = [self._product(e) for e in range(experts)]
                if any(both) and any(found):
                    node = next(n for place, n in self._nodes.items() if place[0] == point)
                    raise refusal(self.cover, node, "twice")
                found = both if any(both) else found
            if not any(found):
                continue
            missing = [e for e, r in enumerate(found) if r is None]
            if missing:
                node = next(n for place, n in self._nodes.items() if place[0] == point)
                raise refusal(self.cover, node, f"that expert {missing[0]} has no counterpart of")
            tables[point] = np.array([_levels(r) for r in found if r is not None], np.float32)
        return tables

    def _tell_totals(self, experts: int) -> None:
        """The sum after the first expert is what that expert gave; before it there is none."""
        first, second = (WEIGHTED, 0), (TOTAL, 1)
        later = any((TOTAL, e) in self._at for e in range(2, experts))
        if not later and second not in self._at:
            return
        if second not in self._at and first in self._at:
            self._at[second], self._nodes[second] = self._at[first], self._nodes[first]
            if not any((WEIGHTED, e) in self._at for e in range(1, experts)):
                del self._at[first]
        if second in self._at:
            self._at[TOTAL, 0] = self._at[second]  # of zero


def _levels(rounding: Rounding) -> Levels:
    return rounding.scale, rounding.low, rounding.high


def _agree(
    cover: Cover,
    block: Block,
    choice: Choice,
    overrides: Mapping[str, Override],
    probes: Sequence[tuple[Array, Array]],
    found: Roundings,
) -> bool:
    """Whether the block, with ``overrides`` that round, and the experts compute the same."""
    own = _own_rounding(cover, block)
    computed = []
    for x, logits in probes:
        rows = x if own is None else rounded(x, *_levels(own))
        values = compute_block(cover, block, rows, logits, overrides)
        assert values is not None, "it was computed before"
        computed.append((rows, logits, result_rows(cover, block, values)))
    rows, logits, got = (np.concatenate(arrays) for arrays in zip(*computed, strict=True))
    if found.x is not None:
        rows = rounded(rows, *_levels(found.x))
    if found.logits is not None:
        logits = rounded(logits, *_levels(found.logits))
    chosen, weights = choose_experts(
        logits, choice.bias, choice.routing, rounding_by(found.routing)
    )
    want = mix(
        rows, chosen, weights, choice.mixture.apply, choice.mixture.gate, choice.mixture.down.n,
        roundings_of(found.tables, choice.mixture.experts),
    )  # fmt: skip
    return bool(np.abs(got - want).max() <= SAME * np.abs(want).max())
