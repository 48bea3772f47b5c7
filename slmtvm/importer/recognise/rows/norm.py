"""RMS norm and layer norm, found by what they compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.evidence.pieces import is_algebraic
from slmtvm.importer.recognise.evidence.ranges import FINITE, range_of, ranges_of
from slmtvm.importer.recognise.evidence.regions import between, constants_of, dominators
from slmtvm.importer.recognise.steps import Elementwise, Norm, Param, Step

_LARGE = 1e3  # inputs at which epsilon does not count
_SMALL = 1e-6  # inputs at which it does
_BETWEEN = 10.0 ** np.arange(-5, 5)  # sizes of inputs at which it may, or something else does
# A length below which a row counts as zero: a bound there keeps a row of zeros from 0 / 0.
_NO_LENGTH = 1e-10
_FIT_TOLERANCE = 1e-6
_SNAP = 1e-3  # how near the measured epsilon must be to a number in the graph to be that number


@dataclass(frozen=True, eq=False)
class _Measured:
    """``gamma * n + beta`` of x float64 (length, width), n its ``groups`` parts each normed."""

    gamma: Array
    beta: Array | None  # of a layer norm
    eps: float
    groups: int


def match_norm(cover: Cover, value: str) -> Step | None:
    """``value`` as a norm of a nearer value.

    The graph between them is measured: at large inputs it shows the form, gamma and beta, at tiny
    ones epsilon. Gamma and beta are then taken from the graph's own constants.
    """
    frame = cover.frame

    def allowed(node: Node) -> bool:
        kind = operator_of(node).kind
        if kind is Kind.MOVE:
            return not frame.small.is_lookup(node)
        return kind is Kind.ELEMENTWISE or (kind is Kind.REDUCE and node.op_type != "Softmax")

    found: tuple[str, Sequence[Node], _Measured] | None = None
    reductions = 0
    for x in dominators(frame, value, allowed):
        nodes = between(frame, x, value)
        width = cover.width(x)
        if width is None or width < 2 or width != cover.width(value):
            continue
        count = sum(operator_of(n).kind is Kind.REDUCE for n in nodes)
        # The nearest value will do, unless another reduction lies before it: an RMS norm of a
        # value that was centred is a layer norm. A bound that may act is no part of a norm.
        fixed = frame.is_fixed(nodes)
        if count <= reductions or not fixed:
            continue
        floors = _floors(cover, x, nodes)
        others = [node for node in nodes if node.outputs[0] not in floors]
        if is_algebraic(frame.small, others, {x: FINITE}):
            measured = _measure(cover, x, value, nodes, width)
            if measured is not None:
                if floors and not measured.eps:  # a row of zeros stays one
                    eps = max(floors.values()) ** 2 * measured.groups / width
                    measured = replace(measured, eps=eps)
                found, reductions = (x, nodes, measured), count
    return None if found is None else _step(cover, value, *found)


def _floors(cover: Cover, x: str, nodes: Sequence[Node]) -> dict[str, float]:
    """What only bounds a length from below, by what is none: values, and their bounds."""
    frozen, found = cover.frame.small, {}
    ranges = ranges_of(frozen, nodes, {x: FINITE})
    for node in nodes:
        if node.op_type not in ("Clip", "Max"):
            continue
        given = [name for name in node.inputs if name]
        bounds = [float(node.attrs[name]) for name in ("min",) if name in node.attrs]
        bounds += [range_of(frozen, ranges, i).high for i in given if i in frozen.constants]
        free = [name for name in given if name not in frozen.constants]
        single = len(bounds) == len(free) == 1 and "max" not in node.attrs
        if node.op_type == "Clip" and len(node.inputs) > 1 and not node.inputs[1]:
            continue  # from above
        if single and 0 < bounds[0] <= _NO_LENGTH and range_of(frozen, ranges, free[0]).low >= 0:
            found[node.outputs[0]] = bounds[0]
    return found


def _step(cover: Cover, value: str, x: str, nodes: Sequence[Node], norm: _Measured) -> Step:
    part = norm.gamma.size // norm.groups
    shared = [v for v in (norm.gamma, norm.beta) if v is not None]
    if all(_repeats(vector, norm.groups) for vector in shared):
        gamma = _named(cover, nodes, norm.gamma[:part], f"{value}.gamma")
        beta = None
        if norm.beta is not None:
            beta = _named(cover, nodes, norm.beta[:part], f"{value}.beta")
        return Norm(cover.need(x), gamma, beta, norm.eps, norm.groups)
    # A gamma of its own for each part: the parts are normed, the gammas a product of features.
    ones = Param(f"{value}.ones", np.ones(part, np.float32))
    zeros = Param(f"{value}.zeros", np.zeros(part, np.float32))
    unit = cover.add(
        f"{value}#unit",
        Norm(cover.need(x), ones, None if norm.beta is None else zeros, norm.eps, norm.groups),
    )
    product = Elementwise("multiply", (unit, _named(cover, nodes, norm.gamma, f"{value}.gamma")))
    if norm.beta is None or not norm.beta.any():
        return product
    scaled = cover.add(f"{value}#scaled", product)
    return Elementwise("add", (scaled, _named(cover, nodes, norm.beta, f"{value}.beta")))


def _repeats(vector: Array, groups: int) -> bool:
    parts = vector.reshape(groups, -1)
    return bool(np.abs(parts - parts[:1]).max() <= _FIT_TOLERANCE * max(np.abs(vector).max(), 1e-3))


def normalize(x: Array, eps: float, *, centred: bool, groups: int = 1) -> Array:
    """x / sqrt(mean(x**2) + eps) of each part of a row, the mean subtracted where ``centred``."""
    parts = x.reshape(len(x), groups, -1)
    if centred:
        parts = parts - parts.mean(axis=2, keepdims=True)
    normed = parts / np.sqrt((parts * parts).mean(axis=2, keepdims=True) + eps)
    return np.asarray(normed).reshape(x.shape)


def _parts(cover: Cover, nodes: Sequence[Node]) -> int | None:
    """In how many parts the reductions among ``nodes`` take a row; None where they disagree."""
    frozen = cover.frame.small
    counts = set()
    for node in nodes:
        operator = operator_of(node)
        if operator.kind is not Kind.REDUCE:
            continue
        assert operator.axes is not None
        shape = frozen.shapes[node.inputs[0]]
        given = [
            None if c is None else c.values()
            for c in (frozen.constants.get(i) for i in node.inputs)
        ]
        axes, _ = operator.axes(node.attrs, given, len(shape))
        lines = math.prod(d for i, d in enumerate(shape) if i not in axes)
        counts.add(lines // frozen.length)
    return counts.pop() if len(counts) == 1 else None


def _measure(
    cover: Cover, x: str, value: str, nodes: Sequence[Node], width: int
) -> _Measured | None:
    length, groups = cover.frame.samples, _parts(cover, nodes)
    if not groups or width % groups or width == groups:
        return None
    samples = [cover.random.normal(size=(length, width)) + 0.5 for _ in range(3)]
    large = [cover.probe(nodes, x, value, s * _LARGE) for s in samples[:2]]
    small = cover.probe(nodes, x, value, samples[2] * _SMALL)
    if small is None or any(y is None for y in large):
        return None
    y = np.concatenate([part for part in large if part is not None])
    for centred in (False, True):
        n = normalize(np.concatenate(samples[:2]) * _LARGE, 0.0, centred=centred, groups=groups)
        gamma, beta = _line(n, y)
        size = np.abs(y).max()
        if not np.abs(n * gamma + beta - y).max() <= _FIT_TOLERANCE * size:
            continue
        if np.abs(beta).max() <= _FIT_TOLERANCE * size:
            beta = np.zeros_like(beta)
        elif not centred:
            continue  # an RMS norm and a bias: the bias is an addition of its own
        parts = (samples[2] * _SMALL).reshape(length * groups, -1)
        gammas = np.tile(gamma.reshape(groups, -1), (length, 1))
        eps = _epsilon(parts, (small - beta).reshape(parts.shape), gammas, centred)
        if eps is None:
            return None
        eps = _snap(eps, cover, nodes)
        for near in (samples[2] * size for size in _BETWEEN):
            expected = normalize(near, eps, centred=centred, groups=groups) * gamma + beta
            result = cover.probe(nodes, x, value, near)
            if result is None or not _agree(result, expected):
                return None
        return _Measured(gamma, beta if centred else None, eps, groups)
    return None


def _agree(result: Array, expected: Array) -> bool:
    bound = 10 * _FIT_TOLERANCE * np.abs(expected).max()
    return bool(np.abs(result - expected).max() <= bound)


def _line(n: Array, y: Array) -> tuple[Array, Array]:
    """Least squares of ``y = gamma * n + beta`` for each feature."""
    dn, dy = n - n.mean(axis=0), y - y.mean(axis=0)
    gamma = (dn * dy).sum(axis=0) / (dn * dn).sum(axis=0)
    return gamma, y.mean(axis=0) - gamma * n.mean(axis=0)


def _epsilon(x: Array, y: Array, gamma: Array, centred: bool) -> float | None:
    """Epsilon from the shrinkage of tiny inputs, or None where rows disagree about it."""
    if centred:
        x = x - x.mean(axis=1, keepdims=True)
    square = (x * x).mean(axis=1)
    full = x / np.sqrt(square)[:, None] * gamma
    shrink = (y * full).sum(axis=1) / (full * full).sum(axis=1)
    if not (np.isfinite(shrink) & (shrink > 0)).all():
        return None
    each = square * (1 / shrink**2 - 1)
    eps = float(np.median(each))
    agree = np.abs(each - eps).max() <= _SNAP * (abs(eps) + _SMALL**2 * _SNAP)
    return max(eps, 0.0) if agree else None


def _snap(eps: float, cover: Cover, nodes: Sequence[Node]) -> float:
    """The number in the graph that the measured ``eps`` is, else ``eps`` itself."""
    numbers = [float(n.attrs["epsilon"]) for n in nodes if "epsilon" in n.attrs]
    numbers += [
        float(c.stored.reshape(-1)[0])
        for c in constants_of(cover.frame.small, nodes)
        if c.plain and c.stored.size == 1 and c.dtype.kind not in "iub"
    ]
    numbers += [1e-5] if any("Norm" in n.op_type for n in nodes) else []  # their default
    near = [number for number in numbers if abs(number - eps) <= _SNAP * eps]
    return min(near, key=lambda number: abs(number - eps)) if near else eps


def _named(cover: Cover, nodes: Sequence[Node], vector: Array, fallback: str) -> Param:
    """The graph's own constant that equals ``vector``, or a new one."""
    for constant in constants_of(cover.frame.small, nodes):
        if np.prod(constant.shape) != vector.size or constant.dtype.kind in "iub":
            continue
        values = constant.values().reshape(-1)
        if np.abs(values - vector).max() <= 10 * _FIT_TOLERANCE * np.abs(vector).max():
            return Param(constant.name, values.astype(np.float32, copy=False))
    return Param(fallback, vector.astype(np.float32))
