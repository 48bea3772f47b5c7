"""Mixtures of experts, however the graph says who goes where.

Exporters write a loop over experts with what each token chose, products with gathered matrices, or
one operator for the experts with the choice before it. The experts' layers are found by structure.
What routes tokens to them is measured: the block is computed on numbers and compared with every
way of routing that is known, each expert taking part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.compute import operator_of
from slmtvm.importer.cover import Cover
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.match.expert_layers import find_experts
from slmtvm.importer.match.expert_weights import Mixture, mixture_of
from slmtvm.importer.match.integers import Int8Product, as_floats, int8_product
from slmtvm.importer.operators import Kind
from slmtvm.importer.regions import ROUNDING, Override, constants_of, evaluate
from slmtvm.importer.steps import Experts, Param
from slmtvm.ir.experts import NORMALIZATIONS, SCORES, Routing
from slmtvm.ir.reference.experts import choose_experts

_MIXTURES = ("MoE", "QMoE")
_TOLERANCE = 2e-6  # relative; probes are in float64, constants are roundings to float32
_LEAD = 4.0  # of the logits of experts that a probe wants to be chosen
_LARGEST_EPS = 1e-3


@dataclass(frozen=True)
class _Block:
    """The nodes that compute ``value`` from the rows ``x``, and the logits among their results."""

    x: str
    value: str
    logits: str
    nodes: list[Node]  # those that need x or the logits, without what makes the logits
    choice: Node  # the TopK
    integers: Mapping[str, Int8Product]  # by their results: products that are of floats in nodes


def match_mixture(cover: Cover, node: Node) -> Experts:
    """A MoE or QMoE node that routes by its own softmax."""
    mixture, routing = mixture_of(cover, node)
    x, logits = (cover.need(name) for name in node.inputs[:2])
    return Experts(x, logits, routing, mixture.gate, mixture.up, mixture.down)


def match_combined(cover: Cover, node: Node, value: str) -> Experts | None:
    """The last step of a mixture: a product of a MoE or QMoE node's result, or a sum of what was
    scattered to the tokens of each expert."""
    makers = [m for name in node.inputs if (m := cover.frame.producers.get(name)) is not None]
    scaled = node.op_type == "Mul" and any(m.op_type in _MIXTURES for m in makers)
    summed = node.op_type == "Add" and any(operator_of(m).kind is Kind.SCATTER for m in makers)
    return match_experts(cover, value) if scaled or summed else None


def match_experts(cover: Cover, value: str) -> Experts | None:
    """``value`` as a mixture of experts; None where it is none that is known."""
    block = _find_block(cover, value)
    if block is None:
        return None
    inner = [n for n in block.nodes if n.op_type in _MIXTURES]
    overrides: dict[str, Override] = {}
    mixture: Mixture | None
    if len(inner) == 1:
        mixture, own = mixture_of(cover, inner[0])
        overrides[inner[0].outputs[0]] = _Operator(mixture, own)
    else:
        mixture = find_experts(cover, block.nodes, block.x, block.integers, overrides)
    if mixture is None or cover.frame.features(block.logits) != mixture.experts:
        return None
    measured = _measure(cover, block, mixture, overrides)
    if measured is None:
        return None
    _check_roundings(cover, block)
    routing, bias = measured
    x, logits = cover.need(block.x), cover.need(block.logits)
    return Experts(x, logits, routing, mixture.gate, mixture.up, mixture.down, bias)


def _check_roundings(cover: Cover, block: _Block) -> None:
    """Raise where the file rounds what experts take or give: probes do not show it."""
    for node in block.nodes:
        if node.op_type in ROUNDING and open_inputs(cover, node):
            raise UnsupportedOpError(
                "rounds activations of experts with a constant scale, which is not supported; "
                "leave out the experts and what chooses them when quantizing",
                where=cover.frame.graph.where(node),
            )


@dataclass(frozen=True)
class _Operator:
    """Computes a MoE node on probes."""

    mixture: Mixture
    routing: Routing

    def __call__(self, inputs: Sequence[Array | None]) -> Array:
        x, logits = inputs[:2]
        assert x is not None and logits is not None
        rows = x.reshape(-1, x.shape[-1])
        chosen, weights = choose_experts(logits.reshape(len(rows), -1), None, self.routing)
        return _mixed(self.mixture.results(rows), chosen, weights).reshape(x.shape)


def _mixed(results: Array, chosen: Array, weights: Array) -> Array:
    """Rows (m, n) from every expert's results (experts, m, n)."""
    picked = results[chosen, np.arange(len(chosen))[:, None]]
    return np.asarray(np.einsum("tj,tjn->tn", weights, picked))


def _find_block(cover: Cover, value: str) -> _Block | None:
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
) -> _Block | None:
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
    return _Block(x, value, logits, floats, choice, integers)


def _measure(
    cover: Cover, block: _Block, mixture: Mixture, overrides: Mapping[str, Override]
) -> tuple[Routing, Param | None] | None:
    """The routing with which the block computes what it does; None where none is known."""
    top_k = _count(cover, block)
    if top_k is None:
        return None
    length, experts = cover.frame.small.length, mixture.experts
    width = cover.frame.features(block.x)
    probes = []
    for turn in range(-(-experts // (length * top_k))):
        x = cover.random.normal(size=(length, width))
        logits = cover.random.normal(size=(length, experts))
        wanted = (np.arange(length * top_k) + turn * length * top_k) % experts
        np.add.at(logits, (np.repeat(np.arange(length), top_k), wanted), _LEAD)
        y = _compute(cover, block, x, logits, overrides)
        if y is None:
            return None
        probes.append((logits, y, mixture.results(x)))
    best: tuple[Routing, Param | None] | None = None
    least = _TOLERANCE
    for routing, bias in _hypotheses(cover, block, experts, top_k):
        scale, error = _fit(probes, routing, None if bias is None else bias.array, least)
        # A later one must be better by far: what fits as well is the same function.
        if error < least / 4:
            best, least = (replace(routing, scale=scale), bias), error
    return best


def _count(cover: Cover, block: _Block) -> int | None:
    constant = cover.frame.small.constants.get(block.choice.inputs[1])
    largest = block.choice.attrs.get("largest", 1)
    return int(constant.values().reshape(-1)[0]) if constant is not None and largest else None


def _compute(
    cover: Cover, block: _Block, x: Array, logits: Array, overrides: Mapping[str, Override]
) -> Array | None:
    frame = cover.frame
    rows = {block.x: x, block.logits: logits}
    given = {name: frame.from_rows(name, array) for name, array in rows.items()}
    try:
        y = evaluate(frame.small, block.nodes, given, block.value, overrides)
    except InvalidModelError:
        return None
    if y.shape != frame.small.shapes[block.value]:
        return None
    return frame.to_rows(block.value, y, frame.small.length)


def _hypotheses(
    cover: Cover, block: _Block, experts: int, top_k: int
) -> Iterator[tuple[Routing, Param | None]]:
    """Every routing that the block's constants allow, its scale apart."""
    constants = constants_of(cover.frame.small, block.nodes)
    numbers = [c for c in constants if c.plain and c.dtype.kind == "f"]
    small = {float(c.stored.reshape(-1)[0]) for c in numbers if c.stored.size == 1}
    epsilons = [0.0, *sorted(n for n in small if 0 < n <= _LARGEST_EPS)]
    vectors = [c for c in numbers if c.stored.size == experts and experts > 1]
    biases: list[Param | None] = [None]
    biases += [Param(c.name, c.stored.reshape(-1).astype(np.float32)) for c in vectors]
    for score, normalize, bias in product(SCORES, NORMALIZATIONS, biases):
        for eps in epsilons if normalize == "sum" else (0.0,):
            yield Routing(experts, top_k, score, normalize, eps), bias


def _fit(
    probes: Sequence[tuple[Array, Array, Array]],
    routing: Routing,
    bias: Array | None,
    tolerance: float,
) -> tuple[float, float]:
    """The scale with which ``routing`` comes nearest to the probes, and how near, relative to their
    largest; where the first is beyond the tolerance the others are not looked at."""
    scale, worst = 0.0, 0.0
    for logits, y, results in probes:
        chosen, weights = choose_experts(logits, bias, routing)
        expected = _mixed(results, chosen, weights)
        if not scale:
            scale = float((expected * y).sum() / max((expected * expected).sum(), 1e-300))
            scale = float(round(scale)) if abs(scale - round(scale)) < _TOLERANCE else scale
        error = np.abs(scale * expected - y).max() / max(np.abs(y).max(), 1e-300)
        worst = max(worst, float(error)) if np.isfinite(error) else np.inf
        if worst > tolerance:
            break
    return scale, worst
