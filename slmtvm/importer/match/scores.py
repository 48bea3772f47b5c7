"""What happens to attention's scores between their matrix product and the softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.compute import operator_of
from slmtvm.importer.cover import Cover
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.match.masks import Mask, read_mask
from slmtvm.importer.operators import Kind
from slmtvm.importer.regions import between, evaluate, signature

MASKED = -9900.0  # scores at or below this vanish in the softmax; bfloat16 makes -1e4 -9984
_TOLERANCE = 1e-5
_LARGE, _SMALL = 1e9, 1e-3  # scores that a cap cuts off, and that it leaves as they are
_MAX_CAP = 1e6


@dataclass(frozen=True, eq=False)
class Scores:
    """``softmax input = cap(scale * q . k) + mask``; cap(s) is ``softcap * tanh(s / softcap)``."""

    scale: float
    softcap: float  # 0 for none
    mask: Mask

    def capped(self, product: Array | float) -> Array:
        """The scores without the mask."""
        scaled = np.asarray(self.scale * product)
        return self.softcap * np.tanh(scaled / self.softcap) if self.softcap else scaled


def match_scores(cover: Cover, raw: str, softmax: Node) -> Scores:
    """How ``raw``, products of queries and keys, become the input of ``softmax``.

    Raises UnsupportedOpError where that is more than a scale, a cap, a mask and a bias by distance.
    """
    nodes = between(cover.frame, raw, softmax.inputs[0])
    key = ("scores", signature(cover.frame, nodes, raw))
    if key not in cover.cache:
        cover.cache[key] = _measure(cover, raw, softmax, nodes)
    scores = cover.cache[key]
    assert isinstance(scores, Scores)
    return scores


def _measure(cover: Cover, raw: str, softmax: Node, nodes: Sequence[Node]) -> Scores:
    frame = cover.frame
    where = frame.graph.where(softmax)

    def short(scores: Array) -> Array:
        n = frame.small.length
        result = evaluate(frame.small, nodes, {raw: scores}, softmax.inputs[0])
        return np.asarray(result.reshape(-1, n, n))

    full_shape = frame.full.shapes[raw]
    if all(operator_of(n).kind in (Kind.ELEMENTWISE, Kind.ROUND) for n in nodes):
        # Constants bring back the heads they distinguish; most do not, and one matrix is enough.
        full_shape = (1,) * (len(full_shape) - 2) + full_shape[-2:]

    def full(score: float) -> Array:
        n = frame.full.length
        given = np.full(full_shape, score, np.float32)
        result = evaluate(frame.full, nodes, {raw: given}, softmax.inputs[0])
        return np.asarray(result.reshape(-1, n, n))

    shape = frame.small.shapes[raw]
    zero = short(np.zeros(shape))
    if np.isnan(zero).any():
        raise UnsupportedOpError(
            "the mask is no number: it was rounded with its infinities in range; exclude the "
            "operators that make it when quantizing",
            where=where,
        )
    seen = zero > MASKED
    if not seen.any():
        raise UnsupportedOpError(
            "the mask hides every position; where it was rounded, exclude the operators that make "
            "it when quantizing",
            where=where,
        )
    scale, softcap = _scale_and_cap(lambda s: short(np.full(shape, s))[seen] - zero[seen])
    scores = Scores(scale, softcap, Mask("causal"))
    samples = cover.random.normal(size=shape) * max(1.0, 2 * softcap / max(abs(scale), 1e-3))
    result = short(samples)
    expected = scores.capped(samples.reshape(result.shape)[seen]) + zero[seen]
    bound = _TOLERANCE * max(np.abs(expected - zero[seen]).max(), 1e-3)
    if not np.abs(result[seen] - expected).max() <= bound:
        raise UnsupportedOpError(
            "scores pass through more than a scale, a cap by tanh and a mask on their way to the "
            "softmax",
            where=where,
        )
    if (result[~seen] > MASKED).any():
        raise UnsupportedOpError("the mask does not hide what it masks", where=where)
    added = full(0.0)
    visible = added > MASKED
    for score in (1.0, _LARGE) if softcap else (1.0,):
        change, expected_change = full(score)[visible] - added[visible], scores.capped(score)
        bound = 10 * _TOLERANCE * max(abs(float(expected_change)), 1e-3)
        bound += float(np.finfo(np.float32).eps) * float(np.abs(added[visible]).max())
        if not np.abs(change - expected_change).max(initial=0) <= bound:
            raise UnsupportedOpError("the scale of scores changes with the position", where=where)
    n = frame.small.length
    mask = read_mask(added, visible, where)
    _check_short(read_mask(zero, seen, where), mask, n, where)
    return Scores(scale, softcap, mask)


def _scale_and_cap(response: Callable[[float], Array]) -> tuple[float, float]:
    """The scale of scores, and the number that caps them or 0; from answers to single numbers."""
    cap = float(np.median(response(_LARGE)))
    slope = float(np.median(response(_SMALL))) / _SMALL
    if not 0 < abs(cap) < _MAX_CAP or abs(cap) > 0.5 * _LARGE * abs(slope):
        return float(np.median(response(1.0))), 0.0
    cap = abs(cap)
    ratio = slope * _SMALL / cap
    return (cap * float(np.arctanh(ratio)) / _SMALL if abs(ratio) < 1 else slope), cap


def _check_short(short: Mask, full: Mask, n: int, where: str) -> None:
    """Raise where the mask of a short sequence is not the beginning of the full one."""
    window = full.window if full.window < n else 0
    same = short.window == window and (short.kind == full.kind or n == 1)
    if (short.bias is None) != (full.bias is None):
        biases = [b for b in (short.bias, full.bias) if b is not None]
        same = same and all(np.ptp(_nearest(b, n, full.kind)) == 0 for b in biases)
    elif short.bias is not None and full.bias is not None:
        near = _nearest(full.bias, n, full.kind)
        tolerance = _TOLERANCE * max(float(np.abs(full.bias).max()), 1e-3)
        same = same and bool((np.abs(near - short.bias) <= tolerance).all())
    if not same:
        raise UnsupportedOpError(
            "the mask changes with the length of the sequence, not only with the positions",
            where=where,
        )


def _nearest(bias: Array, n: int, kind: str) -> Array:
    """The columns of a bias for distances below ``n``."""
    own = bias.shape[1] - 1 if kind == "causal" else bias.shape[1] // 2
    return bias[:, own - n + 1 : own + n]
