"""What happens to attention's scores between their matrix product and the softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.evidence.pieces import Account, in_arrays, probing_numbers
from slmtvm.importer.recognise.evidence.ranges import FINITE
from slmtvm.importer.recognise.evidence.regions import between, evaluate, evaluate_all, signature
from slmtvm.importer.recognise.masks import MASKED, Mask, read_mask
from slmtvm.importer.recognise.rounding.rounding import ScoreRoundings, score_roundings

_TOLERANCE = 1e-5
_LARGE, _SMALL = 1e9, 1e-3  # scores that a cap cuts off, and that it leaves as they are
_MAX_CAP = 1e6
_ABSORBED = 1e-12  # of what is added, in float64


@dataclass(frozen=True, eq=False)
class Scores:
    """``softmax input = cap(scale * q . k) + mask``; cap(s) is ``softcap * tanh(s / softcap)``.

    All this is without ``roundings``, which come in between.
    """

    scale: float
    softcap: float  # 0 for none
    mask: Mask
    roundings: ScoreRoundings


def match_scores(cover: Cover, raw: str, softmax: Node) -> Scores:
    """How ``raw``, products of queries and keys, become the input of ``softmax``.

    Raises UnsupportedOpError where that is more than a scale, a cap, a mask, a bias by distance or
    by the key's position, and roundings.
    """
    nodes = between(cover.frame, raw, softmax.inputs[0])
    key = ("scores", signature(cover.frame, nodes, raw, softmax.inputs[0]))
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

    def full(score: float, at: str = softmax.inputs[0]) -> Array:
        n = frame.full.length
        given = np.full(full_shape, score, np.float32)
        before = between(frame, raw, at)
        result = evaluate(frame.full, before, {raw: given}, at) if before else given
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
    samples = cover.random.normal(size=shape) * max(1.0, 2 * softcap / max(abs(scale), 1e-3))
    result = short(samples)
    expected = _capped(scale, softcap, samples.reshape(result.shape)[seen]) + zero[seen]
    bound = _TOLERANCE * max(np.abs(expected - zero[seen]).max(), 1e-3)
    if not np.abs(result[seen] - expected).max() <= bound:
        raise UnsupportedOpError(
            "scores pass through more than a scale, a cap by tanh and a mask on their way to the "
            "softmax",
            where=where,
        )
    if (result[~seen] > MASKED).any():
        raise UnsupportedOpError("the mask does not hide what it masks", where=where)
    _check_everywhere(cover, raw, nodes, softmax, lambda s: _capped(scale, softcap, s), seen)
    added = full(0.0)
    gain = float(_capped(scale, softcap, 1.0))
    roundings = score_roundings(
        cover, raw, softmax.inputs[0], gain, added, lambda at: full(0.0, at), where
    )
    visible = added > MASKED
    for score in (1.0, _LARGE) if softcap else (1.0,):
        change, expected_change = (
            full(score)[visible] - added[visible],
            _capped(scale, softcap, score),
        )
        bound = 10 * _TOLERANCE * max(abs(float(expected_change)), 1e-3)
        bound += float(np.finfo(np.float32).eps) * float(np.abs(added[visible]).max())
        if not np.abs(change - expected_change).max(initial=0) <= bound:
            raise UnsupportedOpError("the scale of scores changes with the position", where=where)
    mask = read_mask(added, visible, where, exact=bool(roundings.sums))
    _check_short(zero, seen, mask, exact=bool(roundings.sums), where=where)
    return Scores(scale, softcap, mask, roundings)


_TIMES = 4  # that each number is tried, at another place


def _check_everywhere(
    cover: Cover,
    raw: str,
    nodes: Sequence[Node],
    softmax: Node,
    expected: Callable[[Array], Array],
    seen: Array,
) -> None:
    """Raise where ``nodes`` do more to some scores than ``expected``, where they are ``seen``."""
    frozen, output = cover.frame.small, softmax.inputs[0]
    shape, account = frozen.shapes[raw], Account(frozen, nodes, {raw: FINITE})
    zero = evaluate_all(frozen, nodes, {raw: np.zeros(shape)})[output]
    numbers = np.tile(probing_numbers(frozen, nodes), _TIMES)
    for scores in in_arrays(cover.random.permutation(numbers), shape):
        values = evaluate_all(frozen, nodes, {raw: scores})
        products, before, after = (
            x.reshape(seen.shape)[seen] for x in (scores, zero, values[output])
        )
        wanted = expected(products)
        bound = _TOLERANCE * np.abs(wanted) + _ABSORBED * (1 + np.abs(before))
        apart = ~(np.abs(after - before - wanted) <= bound)
        if apart.any():
            raise UnsupportedOpError(
                "scores pass through more than a scale, a cap by tanh and a mask on their way to "
                f"the softmax: a product of queries and keys of {products[apart][0]:g} becomes "
                f"{(after - before)[apart][0]:g} and not {wanted[apart][0]:g}",
                where=cover.frame.graph.where(account.suspect or softmax),
            )
        account.see(values)
    node = account.missing
    if node is not None:
        raise UnsupportedOpError(
            "it may change some scores on their way to the softmax, where a scale, a cap by tanh "
            "and a mask are supported",
            where=cover.frame.graph.where(node),
        )


def _capped(scale: float, softcap: float, product: Array | float) -> Array:
    """The scores without the mask."""
    scaled = np.asarray(scale * product)
    return softcap * np.tanh(scaled / softcap) if softcap else scaled


def _scale_and_cap(response: Callable[[float], Array]) -> tuple[float, float]:
    """The scale of scores, and the number that caps them or 0; from answers to single numbers."""
    cap = float(np.median(response(_LARGE)))
    slope = float(np.median(response(_SMALL))) / _SMALL
    if not 0 < abs(cap) < _MAX_CAP or abs(cap) > 0.5 * _LARGE * abs(slope):
        return float(np.median(response(1.0))), 0.0
    cap = abs(cap)
    ratio = slope * _SMALL / cap
    return (cap * float(np.arctanh(ratio)) / _SMALL if abs(ratio) < 1 else slope), cap


def _check_short(zero: Array, seen: Array, mask: Mask, *, exact: bool, where: str) -> None:
    """Raise where a short sequence's scores are not the beginning of those under ``mask``.

    zero, seen: what is added and where it hides nothing, (heads, n, n). What is the same for all of
    a row's scores may differ unless it must be ``exact``.
    """
    added = np.broadcast_to(mask.square(zero.shape[-1]), zero.shape)
    same = bool(((added > MASKED) == seen).all())
    if same:
        shift = np.where(seen, zero - added, np.nan)
        far = np.abs(shift).max(where=seen, initial=0)
        if not exact:
            far = (np.nanmax(shift, axis=-1) - np.nanmin(shift, axis=-1)).max()
        largest = 0.0 if mask.bias is None else float(np.abs(added[seen]).max())
        same = bool(far <= _TOLERANCE * max(largest, 1e-3))
    if not same:
        raise UnsupportedOpError(
            "the mask changes with the length of the sequence, not only with the positions",
            where=where,
        )
