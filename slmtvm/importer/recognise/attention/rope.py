"""Rotary position embedding, found by what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.evidence.pieces import linear_node
from slmtvm.importer.recognise.evidence.regions import between, dominators, evaluate, signature
from slmtvm.importer.recognise.steps import Rope

_TOLERANCE = 1e-6
_NOTHING = 1e-12  # below what the slowest rotations show in a few positions; zero is exact


@dataclass(frozen=True, eq=False)
class Rotation:
    """``y = factor * rope(x)``: tables (context, r / 2) and how features pair up."""

    cos: Array
    sin: Array
    interleaved: bool
    factor: float


def match_rope(cover: Cover, value: str, head_dim: int) -> tuple[Rope, float] | None:
    """``value``, rows of heads of ``head_dim``, as a rotation of an earlier value, times a factor.

    Only what is linear may lie between them: unit vectors fed through it then show which feature
    goes where at every position of the context, and so its tables. A bound on queries or keys stays
    a step of its own.
    """
    frame = cover.frame

    def allowed(node: Node) -> bool:
        kind = operator_of(node).kind
        return kind in (Kind.ELEMENTWISE, Kind.MOVE) and linear_node(frame.small, node)

    for x in reversed(dominators(frame, value, allowed)):
        width = cover.width(x)
        if width is None or width != cover.width(value) or width % head_dim:
            continue
        nodes = between(frame, x, value)
        if all(operator_of(n).kind is Kind.MOVE for n in nodes):
            continue
        key = ("rope", signature(frame, nodes, x, value), head_dim)
        if key not in cover.cache:
            cover.cache[key] = _measure(cover, x, value, nodes, head_dim)
        rotation = cover.cache[key]
        if isinstance(rotation, Rotation):
            rope = Rope(
                cover.need(x),
                cover.table("rope.cos", rotation.cos),
                cover.table("rope.sin", rotation.sin),
                width // head_dim,
                head_dim,
                rotation.interleaved,
            )
            return rope, rotation.factor
    return None


def _measure(
    cover: Cover, x: str, value: str, nodes: Sequence[Node], head_dim: int
) -> Rotation | None:
    frame = cover.frame
    try:
        short = _answers(cover, frame.small, x, value, nodes, head_dim)
    except InvalidModelError:
        return None  # not a computation on numbers
    if short is None or (short.partner == np.arange(head_dim)).all():
        return None
    # Some features turn so slowly that it shows at far positions only.
    long = _answers(cover, frame.full, x, value, nodes, head_dim)
    halves = None if long is None else _halves(long.partner)
    if long is None or halves is None:
        return None
    first, second = halves
    own, other, r = long.own, long.other, 2 * first.size
    length = frame.small.length
    if np.abs(own[:length] - short.own).max() > _TOLERANCE or (
        np.abs(other[:length] - short.other).max() > _TOLERANCE
    ):
        raise UnsupportedOpError(
            "its rotary tables change with the length of the sequence, not only with the position "
            "(a dynamic or long rope past its original context?); compile for a shorter context",
            where=frame.where(value),
        )
    cos, sin = own[:, first], other[:, second]
    pairs = np.abs(own[:, second] - cos).max() + np.abs(other[:, first] + sin).max()
    if pairs > _TOLERANCE * max(np.abs(own).max(), 1):
        return None
    factor = _factor(cos, sin, own[:, r:])
    if factor is None:
        return None
    rotation = Rotation(
        (cos / factor).astype(np.float32),
        (sin / factor).astype(np.float32),
        bool(r > 2 and first[1] == 2),
        factor,
    )
    return rotation if _agrees(cover, x, value, nodes, head_dim, rotation) else None


@dataclass(frozen=True, eq=False)
class _Answers:
    """What each feature of a head answers to unit vectors, at every position (length, head_dim).

    ``own``: to its own; ``other``: to that of its ``partner`` (head_dim,), the only other feature
    that it reads, itself where there is none.
    """

    partner: Array
    own: Array
    other: Array


def _answers(
    cover: Cover, frozen: Frozen, x: str, value: str, nodes: Sequence[Node], head_dim: int
) -> _Answers | None:
    """The answers of ``value`` to ``x``; None where features do not read each other in pairs.

    Several unit vectors go through at once, one for each head.
    """
    frame, length = cover.frame, frozen.length
    heads = frame.features(x) // head_dim
    partner = np.arange(head_dim)
    own, other = np.zeros((length, head_dim)), np.zeros((length, head_dim))
    for start in range(0, head_dim, heads):
        unit = np.zeros((length, heads, head_dim))
        dims = np.arange(start, min(start + heads, head_dim))
        unit[:, dims - start, dims] = 1
        given = frame.from_rows(x, unit.reshape(length, -1))
        array = evaluate(frozen, nodes, {x: given}, value)
        answer = frame.to_rows(value, array, length).reshape(length, heads, head_dim)
        for head, dim in enumerate(dims):
            own[:, dim] = answer[:, head, dim]
            read = np.flatnonzero((np.abs(answer[:, head]) > _NOTHING).any(axis=0))
            for reader in read[read != dim]:
                if partner[reader] != reader:
                    return None
                partner[reader], other[:, reader] = dim, answer[:, head, reader]
    paired = (partner[partner] == np.arange(head_dim)).all()
    return _Answers(partner, own, other) if paired else None


def _halves(partner: Array) -> tuple[Array, Array] | None:
    """The features a and b of all pairs (a, b): halves of the first features, or one beside the
    other; None where they are neither."""
    rotated = np.flatnonzero(partner != np.arange(partner.size))
    r = rotated.size
    if r == 0 or (rotated != np.arange(r)).any():
        return None
    if (partner[:r] == np.arange(r).reshape(2, -1)[::-1].reshape(-1)).all():
        return np.arange(r // 2), np.arange(r // 2, r)
    if (partner[:r] == np.arange(r) ^ 1).all():
        return np.arange(0, r, 2), np.arange(1, r, 2)
    return None


def _factor(cos: Array, sin: Array, passed: Array) -> float | None:
    """The constant that multiplies rotated and passed-through features alike, 1 if none does."""
    norm = np.sqrt(cos**2 + sin**2)
    through = float(passed[0, 0]) if passed.size else None
    if passed.size and np.abs(passed - through).max() > _TOLERANCE:
        return None
    factor = float(norm.mean())
    uniform = np.abs(norm - factor).max() <= 2 * _TOLERANCE * factor
    if uniform and (through is None or abs(through - factor) <= _TOLERANCE):
        return 1.0 if abs(factor - 1) <= 2 * _TOLERANCE else factor
    # Scaled tables (YaRN) are tables all the same, as long as the other features pass unchanged.
    return 1.0 if through is None or abs(through - 1) <= _TOLERANCE else None


def _agrees(
    cover: Cover, x: str, value: str, nodes: Sequence[Node], head_dim: int, rotation: Rotation
) -> bool:
    frame = cover.frame
    length, width = frame.small.length, frame.features(x)
    samples = cover.random.normal(size=(length, width))
    result = cover.probe(nodes, x, value, samples)
    nothing = cover.probe(nodes, x, value, np.zeros((length, width)))
    if result is None or nothing is None or nothing.any():
        return False
    heads = samples.reshape(length, -1, head_dim)
    expected = rotate(heads, rotation.cos[:length], rotation.sin[:length], rotation.interleaved)
    expected = rotation.factor * expected.reshape(length, width)
    return bool(np.abs(result - expected).max() <= 10 * _TOLERANCE * np.abs(expected).max())


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Rope of x (length, heads, head_dim) with one row of the tables for each position."""
    half = cos.shape[1]
    r = 2 * half
    first, second = (
        (slice(0, r, 2), slice(1, r, 2)) if interleaved else (slice(0, half), slice(half, r))
    )
    c, s = cos[:, None, :], sin[:, None, :]
    a, b = x[..., first], x[..., second]
    result = x.copy()
    result[..., first], result[..., second] = a * c - b * s, b * c + a * s
    return result
