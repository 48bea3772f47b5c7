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

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.evidence.pieces import Account
from slmtvm.importer.recognise.evidence.ranges import FINITE
from slmtvm.importer.recognise.evidence.regions import ROUNDING, Override, constants_of
from slmtvm.importer.recognise.experts.block import (
    Block,
    compute_block,
    find_block,
    open_inputs,
    result_rows,
)
from slmtvm.importer.recognise.experts.layers import find_experts
from slmtvm.importer.recognise.experts.operators import mixture_of
from slmtvm.importer.recognise.experts.places import Choice
from slmtvm.importer.recognise.experts.roundings import Roundings, find_roundings, refusal
from slmtvm.importer.recognise.experts.weights import Mixture
from slmtvm.importer.recognise.rounding.rounding import Rounding
from slmtvm.importer.recognise.steps import Experts, Param, QuantizeDequantize, Rows
from slmtvm.ir.expert_roundings import as_text
from slmtvm.ir.experts import NORMALIZATIONS, SCORES, Routing
from slmtvm.ir.reference.experts import choose_experts

_MIXTURES = ("MoE", "QMoE")
_TOLERANCE = 2e-6  # relative; probes are in float64, constants are roundings to float32
_Measured = tuple[Routing, Param | None]
"""A routing and its bias."""
_NOISE = 1e-13  # errors up to here are all the same: they come from the order of float64 sums
_LEAD = 4.0  # of the logits of experts that a probe wants to be chosen
_LARGEST_EPS = 1e-3
# What rows and logits of a further probe are multiplied by, and what is added to logits: rows that
# reach bounds, logits that leave scores near each other, near 0 (as near as float32 knows) and 1.
_SCALES = (
    (1e4, 1.0, 0.0), (1e-3, 1.0, 0.0), (1.0, 0.1, 0.0), (1.0, 4.0, 0.0), (1.0, 1.0, -12.0),
    (1.0, 1.0, -80.0), (1.0, 1.0, 12.0),
)  # fmt: skip
_NOTHING = (
    1e-3  # what a mixture gives, of what its experts do, below which its own size is no scale
)
_MORE_PROBES = 4  # where numbers must tell places apart


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
    summed = node.op_type == "Add" and any(_scatters(cover, name) for name in node.inputs)
    return match_experts(cover, value) if scaled or summed else None


def _scatters(cover: Cover, name: str) -> bool:
    """Whether ``name`` is what was scattered, rounded or not."""
    node = cover.frame.producers.get(name)
    while node is not None and node.op_type in ROUNDING:
        node = cover.frame.producers.get(node.inputs[0])
    return node is not None and operator_of(node).kind is Kind.SCATTER


def match_experts(cover: Cover, value: str) -> Experts | None:
    """``value`` as a mixture of experts; None where it is none that is known."""
    block = find_block(cover, value)
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
    if not measured:
        return None
    if inner:
        _check_unrounded(cover, block)
        (routing, bias), roundings = measured[0], Roundings()
    else:
        routing, bias, roundings = _round(cover, block, mixture, overrides, measured)
    return Experts(
        _rounded(cover, block.x, roundings.x), _rounded(cover, block.logits, roundings.logits),
        replace(routing, roundings=as_text(roundings.routing)), mixture.gate, mixture.up,
        mixture.down, bias,
        {p: Param(f"{value}.{p}", table) for p, table in roundings.tables.items()},
    )  # fmt: skip


def _round(
    cover: Cover,
    block: Block,
    mixture: Mixture,
    overrides: Mapping[str, Override],
    measured: Sequence[_Measured],
) -> tuple[Routing, Param | None, Roundings]:
    """The first routing of those ``measured`` with which all roundings are known, and these.

    Without roundings they are the same function.
    """
    first: UnsupportedOpError | None = None
    for routing, bias in measured:
        choice = Choice(mixture, routing, None if bias is None else bias.array)
        probes = _draw(cover, block, mixture.experts, routing.top_k, _MORE_PROBES)
        try:
            return routing, bias, find_roundings(cover, block, choice, overrides, probes)
        except UnsupportedOpError as error:
            first = first or error
    assert first is not None
    raise first


def _rounded(cover: Cover, value: str, rounding: Rounding | None) -> Rows:
    """The rows of ``value``, to be found, after a rounding."""
    rows = cover.need(value)
    if rounding is None:
        return rows
    step = QuantizeDequantize(rows, rounding.scale, rounding.low, rounding.high)
    return cover.add(f"{rows}#{rounding}", step)


def _check_unrounded(cover: Cover, block: Block) -> None:
    """Raise where the file rounds what an operator of experts takes or gives."""
    for node in block.nodes:
        if node.op_type in ROUNDING and open_inputs(cover, node):
            raise refusal(cover, node, "around one operator, which is not supported")


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


def _measure(
    cover: Cover, block: Block, mixture: Mixture, overrides: Mapping[str, Override]
) -> list[_Measured]:
    """The routings with which the block computes what it does, the simplest first."""
    top_k = _count(cover, block)
    if top_k is None or not cover.frame.is_fixed(block.nodes):
        return []
    experts = mixture.experts
    given = {block.x: FINITE, block.logits: FINITE}
    probes, account = [], Account(cover.frame.small, block.nodes, given)
    draws = list(_draw(cover, block, experts, top_k))
    for x, logits in (*draws, *(_at_scale(draws[0], *sizes) for sizes in _SCALES)):
        values = compute_block(cover, block, x, logits, overrides)
        if values is None:
            return []
        probes.append((logits, result_rows(cover, block, values), mixture.results(x)))
        account.see(values)
    found: list[_Measured] = []
    least = _TOLERANCE
    for routing, bias in _hypotheses(cover, block, experts, top_k):
        scale, error = _fit(probes, routing, None if bias is None else bias.array, _TOLERANCE)
        error = max(error, _NOISE)
        if error >= _TOLERANCE / 4:
            continue
        # A later one must be better by far: what fits as well is the same function.
        better = error < least / 4
        least = error if better else least
        found.insert(0 if better else len(found), (replace(routing, scale=scale), bias))
    if found and account.missing is not None:
        raise UnsupportedOpError(
            "it may change some numbers in a mixture of experts, which has no such step",
            where=cover.frame.graph.where(account.missing),
        )
    return found


def _at_scale(
    draw: tuple[Array, Array], of_rows: float, of_logits: float, shift: float
) -> tuple[Array, Array]:
    return draw[0] * of_rows, draw[1] * of_logits + shift


def _draw(
    cover: Cover, block: Block, experts: int, top_k: int, times: int = 1
) -> Iterator[tuple[Array, Array]]:
    """Rows of x and of logits until every expert has been wanted so many times.

    Where that is more than once, experts are wanted by other tokens every time.
    """
    length, width = cover.frame.small.length, cover.frame.features(block.x)
    for turn in range(times * -(-experts // (length * top_k))):
        x = cover.random.normal(size=(length, width))
        logits = cover.random.normal(size=(length, experts))
        wanted = (np.arange(length * top_k) + turn * length * top_k) % experts
        if times > 1:
            wanted = cover.random.permutation(wanted)
        np.add.at(logits, (np.repeat(np.arange(length), top_k), wanted), _LEAD)
        yield x, logits


def _count(cover: Cover, block: Block) -> int | None:
    constant = cover.frame.small.constants.get(block.choice.inputs[1])
    largest = block.choice.attrs.get("largest", 1)
    return int(constant.values().reshape(-1)[0]) if constant is not None and largest else None


def _hypotheses(
    cover: Cover, block: Block, experts: int, top_k: int
) -> Iterator[tuple[Routing, Param | None]]:
    """Every routing that the block's constants allow, its scale apart."""
    constants = constants_of(cover.frame.small, block.nodes)
    numbers = [
        Param(c.name, c.values().reshape(-1).astype(np.float32, copy=False))
        for c in constants
        if c.dtype.kind == "f" and c.stored.size in (1, experts)
    ]
    small = {float(number.array[0]) for number in numbers if number.array.size == 1}
    epsilons = [0.0, *sorted(n for n in small if 0 < n <= _LARGEST_EPS)]
    biases: list[Param | None] = [None]
    biases += [n for n in numbers if n.array.size == experts and experts > 1]
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
            if not np.isfinite(scale):
                return 0.0, np.inf
            scale = float(round(scale)) if abs(scale - round(scale)) < _TOLERANCE else scale
        size = max(float(np.abs(y).max()), _NOTHING * float(np.abs(results).max()), 1e-300)
        error = np.abs(scale * expected - y).max() / size
        worst = max(worst, float(error)) if np.isfinite(error) else np.inf
        if worst > tolerance:
            break
    return scale, worst
