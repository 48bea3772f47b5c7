"""What a file makes of hidden tokens: its constants under a mask beside those without one.

A mask reaches the graph's constants only: what is added to scores, tables of positions, factors.
Two kinds of file can be compiled. In one, a hidden token is a key without weight and nothing else
("keys"). In the other, the visible tokens give what they give without the hidden ones ("skip").
Each constant is compared at the visible tokens with the one that the kind says it must be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from slmtvm.errors import SlmError, UnsupportedOpError
from slmtvm.importer.frame.frame import Frame, uniform
from slmtvm.importer.freeze.frozen import Frozen, Shape
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.recognise.cover import Root, Weighing
from slmtvm.importer.recognise.evidence.regions import between, evaluate, signature
from slmtvm.importer.recognise.masked import Probe
from slmtvm.importer.recognise.masks import MASKED
from slmtvm.importer.recognise.pooling import POOLS, pooled_by
from slmtvm.importer.recognise.rounding.rounding import rounding_of
from slmtvm.importer.recognise.steps import (
    Attention,
    Convolution,
    Experts,
    ExpertWeights,
    Linear,
    Same,
)

KINDS = ("skip", "keys")  # in the order in which they are tried: the first costs nothing
_SAME = 1e-6  # of the larger of two numbers, or of 1
_COUNTING = "GroupQueryAttention"
_SUMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")  # of rows, then normed


class _DiffersError(Exception):
    """Why a kind is not the file's: a node and what was found there."""


def mask_kind(probes: Sequence[Probe], *, rounds_rows_together: bool) -> str:
    """Which of KINDS the file is.

    ``rounds_rows_together``: whether dynamic quantization takes its range over all rows of the
    first probe's function, as an encoder's does. Raises UnsupportedOpError where it is neither,
    naming the node and what was found there.
    """
    for probe in probes:
        _check_mixing(probe, rounds_rows_together and probe is probes[0])
    reasons: dict[str, str] = {}
    for kind in KINDS:
        try:
            for probe in probes:
                _check_weights(probe, kind)
                _check_pools(probe, kind)
                _check_other_constants(probe, kind)
            return kind
        except _DiffersError as error:
            reasons[kind] = str(error)
    raise UnsupportedOpError(
        "a hidden token is neither left out, as if it were not in the sequence (not so: "
        f"{reasons['skip']}), nor a key without weight whose position counts (not so: "
        f"{reasons['keys']}); other masks are not supported",
        where=str(probes[0].frame.graph.path),
    )


def _check_mixing(probe: Probe, rounds_rows_together: bool) -> None:
    """Raise where hidden tokens change visible ones by more than attention."""
    for rows, step in probe.cover.steps.items():
        where = probe.frame.where(rows)
        if isinstance(step, Convolution):
            raise UnsupportedOpError(
                "a convolution over neighbouring tokens reads hidden ones, so that masks cannot be "
                "compiled",
                where=where,
            )
        node = probe.frame.producers.get(rows)
        if isinstance(step, Attention) and node is not None and node.op_type == _COUNTING:
            raise UnsupportedOpError(
                "takes how many tokens are visible (seqlens_k) and not which: hidden tokens could "
                "stand at the end alone, so that masks cannot be compiled",
                where=where,
            )
        layers: list[Linear | ExpertWeights] = [step] if isinstance(step, Linear) else []
        layers += [step.up, step.down] if isinstance(step, Experts) else []
        if rounds_rows_together and any(layer.activation == "row_u8" for layer in layers):
            raise UnsupportedOpError(
                "dynamic quantization takes its range over all tokens, hidden ones too, so that "
                "masks cannot be compiled; quantize weights alone, or statically",
                where=where,
            )


def _places(mask: Array, kind: str) -> tuple[Array, Array]:
    """The visible tokens, and where each of them is without a mask."""
    visible = np.flatnonzero(mask)
    return visible, np.arange(visible.size) if kind == "skip" else visible


def _check_weights(probe: Probe, kind: str) -> None:
    """Raise where an attention does not weight visible keys as the kind says, or hidden ones."""
    frame = probe.frame
    checked = set()
    for weighing in probe.cover.weighings:
        if weighing.of_source != probe.of_source:
            continue
        nodes = between(frame, weighing.raw, weighing.scores)
        after = between(frame, weighing.softmax, weighing.weights)
        key = (
            signature(frame, nodes, weighing.raw, weighing.scores),
            signature(frame, after, weighing.softmax, weighing.weights),
            weighing.exact,
        )
        if key in checked:
            continue
        checked.add(key)
        node = frame.producers[weighing.softmax]
        for index, mask in enumerate(probe.masks):
            columns = _places(mask, kind)
            rows = columns
            if probe.of_source:
                length = probe.plain[index].length
                rows = (np.arange(length), np.arange(length))
            for plain, masked in _scores(probe, weighing, nodes, index, rows, columns):
                try:
                    _check_scores(plain, masked, rows, columns, exact=weighing.exact)
                except _DiffersError as error:
                    raise _DiffersError(f"{node.label}: {error}") from error
                except UnsupportedOpError as error:
                    raise UnsupportedOpError(str(error), where=frame.graph.where(node)) from error
        _check_roundings(probe, weighing, nodes)
        _check_guards(probe, weighing, after, frame.graph.where(node))


def _scores(
    probe: Probe,
    weighing: Weighing,
    nodes: Sequence[Node],
    index: int,
    rows: tuple[Array, Array],
    columns: tuple[Array, Array],
) -> Iterator[tuple[Array, Array]]:
    """What a softmax reads, (heads, rows, keys), without the mask and under it: some samples."""
    plain, masked = probe.plain[index], probe.masked[index]
    shape = plain.shapes[weighing.raw]
    if index and all(operator_of(n).kind in (Kind.ELEMENTWISE, Kind.ROUND) for n in nodes):
        shape = (1,) * (len(shape) - 2) + shape[-2:]  # one matrix shows it, and takes less room
    dtype = np.float32 if index else np.float64
    given = np.zeros(shape, dtype)
    yield (
        _after(probe, plain, weighing, nodes, given),
        _after(probe, masked, weighing, nodes, given),
    )
    if index:
        return
    samples = probe.cover.random.normal(size=shape)
    moved = np.zeros(shape)
    moved[..., rows[1][:, None], columns[1]] = samples[..., rows[0][:, None], columns[0]]
    yield (
        _after(probe, plain, weighing, nodes, moved),
        _after(probe, masked, weighing, nodes, samples),
    )


def _after(
    probe: Probe, frozen: Frozen, weighing: Weighing, nodes: Sequence[Node], scores: Array
) -> Array:
    result = evaluate(frozen, nodes, {weighing.raw: scores}, weighing.scores) if nodes else scores
    return result.reshape(-1, *scores.shape[-2:])


def _check_scores(
    plain: Array,
    masked: Array,
    rows: tuple[Array, Array],
    columns: tuple[Array, Array],
    *,
    exact: bool,
) -> None:
    """plain, masked: (heads, rows, keys).

    What is added to all scores of a row changes nothing, unless they must be ``exact``.
    """
    ours = plain[:, rows[1]][:, :, columns[1]]
    theirs = masked[:, rows[0]]
    hidden = np.delete(theirs, columns[0], axis=2)
    theirs = theirs[:, :, columns[0]]
    if not (hidden <= MASKED).all():
        raise UnsupportedOpError(
            "its mask does not take all weight from hidden keys, such as those before the first "
            "visible one (a file that takes a number of tokens rather than a mask of them?)"
        )
    seen = ours > MASKED
    if np.isnan(theirs).any() or (seen != (theirs > MASKED)).any():
        raise _DiffersError("other keys are visible")
    ours, theirs = (np.where(seen, x, 0) for x in (ours, theirs))
    size = np.maximum(np.abs(theirs), np.abs(ours)).max(axis=2)
    shift = theirs - ours
    least, most = (np.where(seen, shift, far) for far in (np.inf, -np.inf))
    if exact:
        least, most = np.minimum(least, 0), np.maximum(most, 0)
    spread = most.max(axis=2) - least.min(axis=2)
    if (spread > 2 * _SAME * np.maximum(size, 1)).any():
        raise _DiffersError("what is added to scores differs")


def _check_roundings(probe: Probe, weighing: Weighing, nodes: Sequence[Node]) -> None:
    """Raise where hidden scores are rounded into a range that does not hide them."""
    masked, mask = probe.masked[0], probe.masks[0]
    zeros = np.zeros(probe.frame.small.shapes[weighing.raw])
    for node in nodes:
        if node.op_type != "QuantizeLinear":
            continue
        before = between(probe.frame, weighing.raw, node.inputs[0])
        given = {weighing.raw: zeros}
        scores = evaluate(masked, before, given, node.inputs[0]) if before else zeros
        rows = scores.reshape(zeros.shape)
        rows = rows if probe.of_source else rows[..., mask, :]
        rounding = rounding_of(probe.cover, node)
        if (rows[..., ~mask] <= MASKED).any() and rounding.low * rounding.scale > MASKED:
            raise UnsupportedOpError(
                "scores are rounded after the mask was added to them, which what it hides does not "
                "survive; exclude this operator when quantizing",
                where=probe.frame.graph.where(node),
            )


def _check_guards(probe: Probe, weighing: Weighing, nodes: Sequence[Node], where: str) -> None:
    """Raise where the mask changes the weights of visible rows after the softmax."""
    if not nodes:
        return
    masked, mask = probe.masked[0], probe.masks[0]
    shape = probe.frame.small.shapes[weighing.softmax]
    numbers = ((np.arange(np.prod(shape)) + 1) / (np.prod(shape) + 1)).reshape(shape)
    numbers = numbers * mask  # hidden keys have no weight
    result = evaluate(masked, nodes, {weighing.softmax: numbers}, weighing.weights)
    rows = slice(None) if probe.of_source else np.flatnonzero(mask)
    if (result.reshape(shape)[..., rows, :] != numbers[..., rows, :]).any():
        raise UnsupportedOpError(
            "its mask changes weights after the softmax, which is not supported", where=where
        )


def _check_pools(probe: Probe, kind: str) -> None:
    """Raise where a pooling is not that of visible rows.

    The first row is row 0, visible or not, where hidden tokens are keys; where they are left out it
    is that of the first visible token, whatever the file takes.
    """
    frame = probe.frame
    for root in probe.cover.pools:
        if root.how == "first":
            continue
        source, nodes = _pooling(probe, root)
        node = frame.producers[root.value]
        for frozen, mask in zip(probe.masked, probe.masks, strict=True):
            rows = probe.cover.random.normal(size=(frozen.length, frame.features(source)))
            all_count = root.how == "last" and kind == "keys"
            at = np.arange(frozen.length) if all_count else np.flatnonzero(mask)
            got = pooled_by(frame, frozen, nodes, source, root.value, rows)
            want = POOLS[root.how](rows[at], at)
            if got is None or not np.allclose(got, want, rtol=_SAME, atol=_SAME):
                raise _DiffersError(
                    f"{node.label}: the {root.how} of rows does not leave out hidden ones"
                )


def _pooling(probe: Probe, root: Root) -> tuple[str, list[Node]]:
    """The rows before all that the mask does to them, and the nodes that pool them."""
    steps, frame = probe.cover.steps, probe.frame
    source = root.source
    while isinstance(step := steps.get(source), Same) and step.x in frame.small.shapes:
        source = step.x
    return source, between(frame, source, root.value)


def _check_other_constants(probe: Probe, kind: str) -> None:
    """Raise where another constant than those of scores differs from what the kind says."""
    frame = probe.frame
    inside = {
        id(node)
        for weighing in probe.cover.weighings
        for begin, end in (
            (weighing.raw, weighing.scores), (weighing.softmax, weighing.weights),
        )
        for node in between(frame, begin, end)
    }  # fmt: skip
    inside |= {id(node) for root in probe.cover.pools for node in _pooling(probe, root)[1]}
    for node in probe.needed:
        for place, name in enumerate(node.inputs):
            if name and id(node) not in inside and probe.is_constant(name):
                _check_constant(probe, node, place, kind)
        for name in node.outputs:
            if probe.plain[0].shapes.get(name) != probe.masked[0].shapes.get(name):
                raise UnsupportedOpError(
                    f"the mask changes the shape of {name!r}", where=frame.graph.where(node)
                )


def _touched(probe: Probe, name: str) -> bool:
    """Whether the mask changes the constant ``name``."""
    plain, masked = (frozen.constants[name] for frozen in (probe.plain[0], probe.masked[0]))
    if plain is masked or plain.stored is masked.stored:
        return False
    return plain.shape != masked.shape or not np.array_equal(plain.stored, masked.stored)


def _grows(probe: Probe, name: str) -> bool:
    """Whether the constant ``name`` is as long as the sequence."""
    small, full = (frozen.constants[name] for frozen in probe.plain)
    return small.shape != full.shape


def _check_constant(probe: Probe, node: Node, place: int, kind: str) -> None:
    """Raise where operand ``place`` of ``node`` has not the rows that the kind says."""
    frame, name = probe.frame, node.inputs[place]
    where = frame.graph.where(node)
    rows_of, touched = _rows_of(frame, node, place), _touched(probe, name)
    moves = operator_of(node).kind is Kind.MOVE
    if not touched and (probe.of_source or moves or not _grows(probe, name)):
        return
    if rows_of is None and not touched:
        if kind == "keys" or uniform(probe.plain[0], name) is not None:
            return
        raise _DiffersError(f"{node.label}: {name!r} counts all tokens")
    if probe.of_source or rows_of is None:
        raise UnsupportedOpError(
            f"its operand {name!r} follows from the mask, which is not supported here", where=where
        )
    for plain, masked, mask in zip(probe.plain, probe.masked, probe.masks, strict=True):
        visible, before = _places(mask, kind)
        try:
            ours, theirs = (rows_of(frozen, name) for frozen in (plain, masked))
        except SlmError as error:
            raise UnsupportedOpError(
                f"its operand {name!r} follows from the mask in a way that is not supported: "
                f"{error}",
                where=where,
            ) from error
        if not np.allclose(theirs[visible], ours[before], rtol=_SAME, atol=_SAME):
            raise _DiffersError(f"{node.label}: the rows of {name!r}, by position, differ")


def _rows_of(frame: Frame, node: Node, place: int) -> Callable[[Frozen, str], Array] | None:
    """How an operand of ``node`` lies in rows of tokens; None where it does not."""
    if node.op_type == "RotaryEmbedding" and place == 1:
        return lambda frozen, name: _positions(frozen, name)
    value = node.outputs[0]
    by_element = operator_of(node).kind is Kind.ELEMENTWISE or node.op_type in _SUMS
    if not by_element or value not in frame.small.shapes:
        return None

    def rows(frozen: Frozen, name: str) -> Array:
        shape: Shape = frozen.shapes[value]
        wide = np.broadcast_to(frozen.constants[name].values(table=True), shape)
        return frame.to_rows(value, wide, frozen.length)

    return rows


def _positions(frozen: Frozen, name: str) -> Array:
    values = frozen.constants[name].values().reshape(-1)
    if values.size != frozen.length:
        raise UnsupportedOpError(f"{values.size} positions for {frozen.length} tokens")
    return values
