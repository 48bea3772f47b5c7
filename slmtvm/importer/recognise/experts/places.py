"""Where in a mixture of experts the same numbers are computed as a graph rounds.

A rounding with one scale treats every element alike, so it does not matter how a graph lays values
out: only which numbers there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slmtvm.importer.graph import Array, Node
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.evidence.regions import Override
from slmtvm.importer.recognise.experts.block import Block, compute_block
from slmtvm.importer.recognise.experts.weights import Mixture
from slmtvm.ir.experts import Routing
from slmtvm.ir.reference.experts import Round, choose_experts, mix
from slmtvm.schedules.experts.points import BEFORE_GATE, INPUT, POINTS, ROUTING_POINTS, TOTAL

SAME = 1e-6  # relative, of what is computed in float64 from constants in float32
X, LOGITS, PICKED = "x", "logits", "picked"  # points outside, and of the chosen scores
PRODUCT = "product"  # both points BEFORE_GATE in one value

Place = tuple[str, int | None]
"""A point and an expert, or None for what is computed for all of them at once."""


@dataclass(frozen=True)
class Choice:
    """Experts, and how rows get to them."""

    mixture: Mixture
    routing: Routing
    bias: Array | None


def find_places(
    cover: Cover,
    block: Block,
    choice: Choice,
    overrides: Mapping[str, Override],
    probes: Sequence[tuple[Array, Array]],
    quantizers: Sequence[Node],
) -> dict[str, tuple[Place, ...]]:
    """For each result of ``quantizers`` where the same numbers are computed, in the order of
    computing; what is zero on all probes is left out, as rounding leaves it."""
    taken: dict[str, list[Array]] = {n.outputs[0]: [] for n in quantizers}
    for x, logits in probes:
        values = compute_block(cover, block, x, logits, overrides)
        assert values is not None, "it was computed before"
        for node in quantizers:
            taken[node.outputs[0]].append(_nonzero(values[node.inputs[0]]))
    x, logits = (np.concatenate(arrays) for arrays in zip(*probes, strict=True))
    known = {place: np.sort(_nonzero(array)) for place, array in _recorded(choice, x, logits)}
    found: dict[str, tuple[Place, ...]] = {}
    for name, parts in taken.items():
        numbers = np.sort(np.concatenate(parts))
        if numbers.size:
            found[name] = tuple(p for p, array in known.items() if _same(numbers, array))
    return found


def _nonzero(array: Array) -> Array:
    return array[array != 0]


def _same(a: Array, b: Array) -> bool:
    return a.size == b.size and bool(np.abs(a - b).max(initial=0) <= SAME * np.abs(a).max())


def _recorded(choice: Choice, x: Array, logits: Array) -> Iterator[tuple[Place, Array]]:
    """What is computed at every place, without roundings, in the order of computing."""
    of_routing: dict[str, Array] = {}
    of_expert: dict[Place, Array] = {}

    def note_routing(point: str, value: Array) -> Array:
        of_routing[point] = value
        return value

    def noting(expert: int) -> Round:
        def note(point: str, value: Array) -> Array:
            of_expert[point, expert] = value.copy()
            return value

        return note

    experts, routing = choice.mixture.experts, choice.routing
    chosen, weights = choose_experts(logits, choice.bias, routing, note_routing)
    mix(
        x, chosen, weights, choice.mixture.apply, choice.mixture.gate, choice.mixture.down.n,
        [noting(expert) for expert in range(experts)],
    )  # fmt: skip
    yield (X, None), x
    yield (LOGITS, None), logits
    for point in ROUTING_POINTS[:2]:
        yield (point, None), of_routing[point]
    yield (PICKED, None), np.take_along_axis(of_routing["scores"], chosen, axis=1)
    for point in ROUTING_POINTS[2:]:
        if point in of_routing:
            yield (point, None), of_routing[point]
    if ("gate", int(chosen[0, 0])) in of_expert:
        for expert in np.unique(chosen).tolist():
            halves = [of_expert[point, expert] for point in BEFORE_GATE]
            of_expert[PRODUCT, expert] = np.concatenate(halves)
    for point in (INPUT, PRODUCT, *POINTS[1:]):
        own = {e: of_expert[point, e] for e in range(experts) if (point, e) in of_expert}
        if point != TOTAL and own:
            yield (point, None), np.concatenate([a.reshape(-1) for a in own.values()])
        for expert in range(experts):
            yield (point, expert), own.get(expert, np.zeros(0))
