"""Activations that the file rounds with constant scales: QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.frame.frame import Frame
from slmtvm.importer.graph import Array, Constant, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.evidence.pieces import is_linear
from slmtvm.importer.recognise.evidence.ranges import SHARES
from slmtvm.importer.recognise.evidence.regions import Override, between, evaluate
from slmtvm.importer.recognise.masks import MASKED
from slmtvm.importer.recognise.steps import Param, QuantizeDequantize, Rescale, Rows, Same, Step
from slmtvm.ir.reference.rounding import rounded

_TOLERANCE = 1e-5
_SAME_SHARE = 1e-12  # of numbers in float64
_SEED = 0
_LARGE = 1e9  # a score that every cap cuts off


@dataclass(frozen=True)
class Rounding:
    """What QuantizeLinear and DequantizeLinear with one scale and zero point do to each value."""

    scale: float
    low: int  # of the integer type, less the zero point
    high: int

    def __str__(self) -> str:
        """As the attributes of ``ir.ops.attention`` have it."""
        return f"{self.scale!r}:{self.low}:{self.high}"


def match_rounding(cover: Cover, value: str) -> Step | None:
    """``value`` as a rounded float value; what moves the integers between is looked through.

    Rounding again what was rounded in the same way changes nothing and disappears.
    """
    frame = cover.frame
    node = frame.producers[value]
    if node.op_type != "DequantizeLinear" or node.inputs[0] not in frame.small.shapes:
        return None
    source, features = cover.moved(node.inputs[0])
    quantizer = frame.producers.get(source)
    if quantizer is None or quantizer.op_type != "QuantizeLinear":
        return None
    rounding = rounding_of(cover, quantizer)
    if rounding_of(cover, node) != rounding:
        raise UnsupportedOpError(
            f"its scale and zero point are not those of {quantizer.label}",
            where=frame.graph.where(node),
        )
    origin, origin_features = cover.moved(quantizer.inputs[0])
    rows = cover.columns(origin, origin_features[features])
    before = frame.producers.get(origin)
    if before is not None and before.op_type == "DequantizeLinear":
        earlier = match_rounding(cover, origin)
        if earlier is not None and rounding_of(cover, before) == rounding:
            return Same(rows)
    rows = _rescaled(cover, quantizer, rows, features)
    return QuantizeDequantize(rows, rounding.scale, rounding.low, rounding.high)


def _rescaled(cover: Cover, quantizer: Node, rows: Rows, features: Array) -> Rows:
    """``rows``, the ``features`` of what is rounded, as multiples of the scale that it is rounded
    with, where they are known to be multiples of something else."""
    steps = quantizer.attrs.get("steps")
    if not isinstance(steps, Constant):
        return rows
    frame, value = cover.frame, quantizer.inputs[0]
    numbers = np.broadcast_to(steps.stored, frame.small.shapes[value]).reshape(-1)
    by_feature = numbers[frame.rows(value)[0, features]]
    step = Rescale(rows, Param(f"{value}.steps", by_feature), rounding_of(cover, quantizer).scale)
    return cover.add(f"{rows}#rescaled", step)


def rounding_of(cover: Cover, node: Node) -> Rounding:
    """The constants of a QuantizeLinear or DequantizeLinear of activations."""
    frame = cover.frame
    where = frame.graph.where(node)
    given = [frame.small.constants.get(i) if i else None for i in node.inputs[1:]]
    scale, zero = given[0], given[1] if len(given) > 1 else None
    if scale is None or (len(node.inputs) > 2 and node.inputs[2] and zero is None):
        raise UnsupportedOpError("scale and zero point must be constants", where=where)
    zeros = np.zeros(1, np.int64) if zero is None else zero.values().astype(np.int64).reshape(-1)
    scales = scale.values().astype(np.float32).reshape(-1)
    if not 0 < scales[0] < np.inf:
        raise UnsupportedOpError(
            f"a scale of {scales[0]}, where a positive number is needed; where infinities (of a "
            "mask) made it so, exclude this operator when quantizing",
            where=where,
        )
    if (scales != scales[0]).any() or (zeros != zeros[0]).any():
        raise UnsupportedOpError(
            "activations rounded with several scales are not supported; one for the tensor is",
            where=where,
        )
    integers = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    # Where the shape of a value is not known, neither is its type; a zero point has the same.
    dtype = frame.small.dtypes.get(integers) if zero is None else zero.dtype
    if dtype is None:
        raise UnsupportedOpError("a zero point is needed to know the integer type", where=where)
    if dtype.kind not in "iu":
        raise UnsupportedOpError(
            f"activations are rounded to {dtype}, where only integers are supported; leave them in "
            "float when quantizing, or round them to 8-bit integers",
            where=where,
        )
    limits = np.iinfo(dtype)
    return Rounding(float(scales[0]), limits.min - int(zeros[0]), limits.max - int(zeros[0]))


def rounding_override(rounding: Rounding) -> Override:
    """Rounds probes, which ``evaluate`` does not do by itself."""

    def compute(inputs: Sequence[Array | None]) -> Array:
        assert inputs[0] is not None
        return rounded(inputs[0], rounding.scale, rounding.low, rounding.high)

    return compute


@dataclass(frozen=True)
class ScoreRoundings:
    """How scores are rounded on their way to the softmax, as ``ir.ops.attention`` has it.

    ``products``, each with what products are multiplied by since the last one; after them all,
    products are ``scaled``. ``sums`` are those after a cap or a bias, as they would be at the
    softmax.
    """

    products: tuple[tuple[float, Rounding], ...]
    scaled: float
    sums: tuple[tuple[float, Rounding], ...]


def score_roundings(
    cover: Cover,
    raw: str,
    output: str,
    gain: float,
    added: Array,
    added_at: Callable[[str], Array],
    where: str,
) -> ScoreRoundings:
    """How products ``raw`` are rounded on their way to ``output``, where 1 gives ``gain``.

    added: what is added to them there, and ``added_at`` another value on the way; without heads
    where it is the same for all. Where a mask was added before a rounding, what it hides must stay
    hidden.
    """
    products: list[tuple[float, Rounding]] = []
    sums: list[tuple[float, Rounding]] = []
    scaled, seen = 1.0, added > MASKED
    for quantizer in _rounders(between(cover.frame, raw, output)):
        here = np.broadcast_to(added_at(quantizer.inputs[0]), added.shape)
        (slope, capped), rounding = (
            _gain_at(cover, raw, quantizer, where),
            rounding_of(cover, quantizer),
        )
        if not (np.maximum(here[here <= MASKED], rounding.low * rounding.scale) <= MASKED).all():
            raise UnsupportedOpError(
                "scores are rounded after a mask was added to them, which what it hides does not "
                f"survive (at {quantizer.label}); exclude that operator when quantizing",
                where=where,
            )
        if not sums and not capped and (here[seen] == 0).all():
            if not products or products[-1][1] != rounding or slope != scaled:
                products.append((slope / scaled, rounding))
            scaled = slope
            continue
        ratio = gain / slope
        bound = _TOLERANCE * float(np.abs(added[seen]).max())
        if not np.abs(ratio * here[seen] - added[seen]).max() <= bound:
            raise UnsupportedOpError(
                "something is added to scores that were rounded after a cap or a bias (behind "
                f"{quantizer.label}), which is not supported",
                where=where,
            )
        rounding = Rounding(rounding.scale * ratio, rounding.low, rounding.high)
        if not sums or sums[-1][1] != rounding:
            sums.append((1.0, rounding))
    return ScoreRoundings(tuple(products), scaled, tuple(sums))


def _gain_at(cover: Cover, raw: str, quantizer: Node, where: str) -> tuple[float, bool]:
    """What a product of 1 gives where it is rounded, and whether large ones are capped there."""
    frame, at = cover.frame, quantizer.inputs[0]
    nodes, shape = between(frame, raw, at), frame.small.shapes[raw]
    zero, one, large = (
        evaluate(frame.small, nodes, {raw: given}, at) if nodes else given
        for given in (np.full(shape, score) for score in (0.0, 1.0, _LARGE))
    )
    seen = zero > MASKED
    gains, most = (one - zero)[seen], (large - zero)[seen]
    gain = float(np.median(gains))
    if not np.abs(gains - gain).max() <= _TOLERANCE * abs(gain):
        raise UnsupportedOpError("rounded scores have more than one scale", where=where)
    return gain, bool((np.abs(most) < _LARGE / 2 * abs(gain)).any())


def weight_roundings(
    cover: Cover, softmax: str, left: str, where: str
) -> tuple[tuple[tuple[float, Rounding], ...], float]:
    """How probabilities ``softmax`` are rounded until they are the left side of a product.

    As ``score_roundings`` has it: each with what they are multiplied by since the last one.
    """
    frame = cover.frame
    found: list[tuple[float, Rounding]] = []
    product = 1.0
    for quantizer in _rounders(between(frame, softmax, left)):
        share = share_of(frame, softmax, quantizer.inputs[0])
        if share is None:
            raise UnsupportedOpError("rounded probabilities are changed in other ways", where=where)
        rounding = rounding_of(cover, quantizer)
        if not found or found[-1][1] != rounding or share != product:
            found.append((share / product, rounding))
        product = share
    return tuple(found), product


def as_text(roundings: Sequence[tuple[float, Rounding]], before: float = 1.0) -> str:
    """``roundings``, each with its factor, as the attributes of ``ir.ops.attention`` have them.

    before: a factor of what the first one rounds.
    """
    factors = [(before if i == 0 else 1.0) * factor for i, (factor, _) in enumerate(roundings)]
    return ";".join(
        f"{f!r}:{rounding}" for f, (_, rounding) in zip(factors, roundings, strict=True)
    )


def share_of(frame: Frame, source: str, value: str) -> float | None:
    """The number that makes ``value`` out of probabilities ``source``, all of them in their order.

    None where there is none.
    """
    shape = frame.small.shapes[source]
    # Numbers without any order show that reshapes leave every element in place.
    numbers = np.random.default_rng(_SEED).uniform(0.1, 1.0, shape)
    nodes = between(frame, source, value)
    if not frame.is_fixed(nodes) or not is_linear(frame.small, nodes, {source: SHARES}):
        return None
    try:
        nothing, result = (
            evaluate(frame.small, nodes, {source: given}, value) if nodes else given
            for given in (np.zeros(shape), numbers)
        )
    except InvalidModelError:
        return None
    if result.size != numbers.size or nothing.any():
        return None
    shares = result.reshape(shape) / numbers
    share = float(np.median(shares))
    return share if share > 0 and np.abs(shares / share - 1).max() <= _SAME_SHARE else None


def _rounders(nodes: Sequence[Node]) -> list[Node]:
    return [n for n in nodes if operator_of(n).kind is Kind.ROUND]
