"""Linear layers with zeros anywhere in int8 weights, for many rows: a vector holds rows of bytes.

What ``by_row`` computes, to the same bits. A channel lists its weights that are not zero in groups
of four, see ``fours``; the activations come turned (``turned_bytes``), all rows of a k together, so
that those of any two k are dealt into each other and multiplied by their weights at once.

What a whole group adds, or half of another one, fits an int16, g. Of the sum S of all g, one int16
keeps S mod 2**16, another C, the sum of g >> 8. As 256 (g >> 8) is at most 255 below g, less than
257 of them leave 0 <= S - 256 C < 2**16: the difference is known from S mod 2**16, and so is S.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.isa.base import Buffer, Expr, let, load, splat
from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.linear import by_row, fours, turned_bytes
from slmtvm.schedules.linear.blocks import without_zero_points
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace
from slmtvm.schedules.linear.listed_blocks import write_rows
from slmtvm.schedules.linear.scheme import Weights
from slmtvm.schedules.linear.shape import FREE, LinearShape
from slmtvm.schedules.linear.tile import Registers, Store, Tile
from slmtvm.schedules.linear.turned_bytes import VECTOR
from slmtvm.schedules.order import alone

MOST_TERMS = 255
"""Whole groups and halves of others, of a channel: C is -128 to 127 for each, an int16 in all."""

USUAL_FILL = 0.8
"""Of the places of groups, those that weights take where these are not known."""

MAX_K = 8176
"""Places are uint16, in steps of ``PLACE``."""

PLACE = 8
"""Of one k: its rows lie at 8 times as much, and addresses of x86 multiply by 8."""

_WORDS = 2 * VECTOR // 4  # lanes of int16
_BYTES_OF_GROUP = fours.SIZE * (2 + 1)
_MOST_USED = 0.75  # of the weights
_HALVED = 1.25  # of the time of a whole group, that a halved one takes: by instructions
_ONE_VECTOR = 0.57  # of the time of a row block, that one of its vectors takes alone: measured

operands = by_row.operands


def activations(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """xt as ``turned_bytes`` has it; xs and xz as ``by_row`` has them."""
    return [turned_bytes.tensor(shape), *by_row.activations(shape, isa)[1:]]


def weight_tensors(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """starts int32 (channels + 1): where in the last two the groups of each channel begin; halved
    int32 (channels): the same of its halved ones, which are behind its whole ones; places uint16
    (., 4): k of each weight, times PLACE; values int8 (., 4); then what ``by_row`` has beside the
    weight."""
    channels = isa.panels(shape.n) * isa.panel
    most = channels * min(MOST_TERMS, shape.padded_k)
    return [
        Tensor("starts", (channels + 1,), "int32"),
        Tensor("halved", (channels,), "int32"),
        Tensor("places", (most, fours.SIZE), "uint16", at_most=True),
        Tensor("values", (most, fours.SIZE), "int8", at_most=True),
        *by_row.weight_tensors(shape, isa)[1:],
    ]


def pack(shape: LinearShape, isa: Isa, weights: Weights) -> list[np.ndarray]:
    """As ``by_row`` takes them; zero points are taken off the weights, see ``blocks.centred``."""
    whole, *beside, _ = by_row.padded(shape, isa, without_zero_points(shape, weights))
    groups = fours.deal(whole)
    ends = (groups.wholes + groups.halved).cumsum()
    starts = np.concatenate([[0], ends]).astype(np.int32)
    halved = (ends - groups.halved).astype(np.int32)
    places, values = groups.places * np.uint16(PLACE), groups.weights
    if not len(places):  # an array has to hold something; no list has this group
        places, values = np.zeros((1, fours.SIZE), np.uint16), np.zeros((1, fours.SIZE), np.int8)
    return [starts, halved, places, values, *beside]


def density(shape: LinearShape, weights: Weights) -> float | None:
    """Which part of k the places of whole groups would be that take as long as all groups do; None
    where a channel has too many, or too few of its weights are zero for lists to gain."""
    if shape.padded_k > MAX_K:
        return None
    weight = without_zero_points(shape, weights).weight
    if np.count_nonzero(weight) > _MOST_USED * weight.size:
        return None
    groups = fours.deal(weight)
    if (groups.wholes + 2 * groups.halved).max() > MOST_TERMS:
        return None
    return float((groups.wholes + _HALVED * groups.halved).mean()) * fours.SIZE / shape.k


def relative_time(shape: LinearShape, isa: Isa, density: float) -> float:
    """What the kernel is expected to take, of the dense kernel's time."""
    assert isa.listed_weights is not None, isa.name
    blocks, rest = divmod(shape.m, turned_bytes.ROWS)
    last = (0.0, _ONE_VECTOR, 1.0)[-(-rest // VECTOR)]
    computed = (blocks + last) * turned_bytes.ROWS / shape.m  # of each row that there is
    return computed * (density * isa.listed_weights.step + isa.listed_weights.ends / shape.k)


def bytes_left(density: float) -> float:
    """Bytes of the lists, of those of all weights."""
    return density * _BYTES_OF_GROUP / fours.SIZE


def layout(shape: LinearShape, isa: Isa) -> str:
    """See ``linear.layout``."""
    return f"{FREE}{fours.SIZE}-panel{isa.panel}-{shape.format}-row_u8"


def emit(
    shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    isa, lanes = tile.isa, tile.isa.lanes
    vectors = -(-tile.rows // VECTOR)
    start = let(T.Cast("int64", tile.first_row) * shape.padded_k)  # of the row block in xt
    # A channel's sums are a row of these: squares of them are turned to have channels in lanes.
    parts = vectors * VECTOR // lanes
    staged = T.alloc_buffer((lanes * parts * lanes,), "int32", scope="local")

    def stage(part: int, channel: Expr, sums: Expr) -> None:
        T.buffer_store(staged, sums, [T.ramp((part * lanes + channel) * lanes, 1, lanes)])

    with T.serial(tile.channels) as channel:
        at = let(tile.channel(0) + channel)
        low = Registers("uint16", _WORDS, 2 * vectors)
        high = Registers("int16", _WORDS, 2 * vectors)
        begin, end = let(named["starts"][at]), let(named["starts"][at + 1])
        middle = let(named["halved"][at])

        def add(index: Expr, whole: bool, low: Registers = low, high: Registers = high) -> None:
            for cell, products in _products(isa, named, start, index, vectors):
                if whole:
                    products = [let(products[0] + products[1])]
                for g in products:
                    low[cell] = low[cell] + T.reinterpret(f"uint16x{_WORDS}", g)
                    high[cell] = high[cell] + T.shift_right(g, splat(8, "int16", _WORDS))

        with T.serial(begin, middle) as index:
            add(index, whole=True)
        with T.serial(middle, end) as index:
            add(index, whole=False)
        for cell in range(2 * vectors):
            for i, sums in enumerate(_whole(low[cell], high[cell])):
                stage(2 * cell + i, channel, sums)
    for channel in range(tile.channels, lanes):
        for part in range(parts):
            stage(part, channel, splat(0, "int32", lanes))
    write_rows(tile, named, staged, store)


def _products(
    isa: Isa, named: Mapping[str, Buffer], start: Expr, index: Expr, vectors: int
) -> Iterator[tuple[int, list[Expr]]]:
    """Of each vector's low and high rows, their number and what both halves of a group add."""
    group = let(index * fours.SIZE)
    rows = [
        let(start + alone(T.Cast("int64", named["places"][group + i])) * PLACE)
        for i in range(fours.SIZE)
    ]
    values = [_broadcast(named["values"], group + i) for i in (0, 2)]
    for v in range(vectors):
        loaded = [let(named["xt"][T.ramp(row + v * VECTOR, T.int64(1), VECTOR)]) for row in rows]
        halves = [
            [isa.multiply_bytes(pair, value) for pair in turned_bytes.dealt(a, b)]
            for a, b, value in zip(loaded[::2], loaded[1::2], values, strict=True)
        ]
        for part, products in enumerate(zip(*halves, strict=True)):
            yield 2 * v + part, list(products)


def _broadcast(buffer: Buffer, at: Expr) -> Expr:
    """The two weights from ``at`` in all words of a vector."""
    word = T.reinterpret("int16", load(buffer, at, 2))
    return let(T.reinterpret(f"int8x{VECTOR}", T.Broadcast(word, _WORDS)))


def _whole(low: Expr, high: Expr) -> list[Expr]:
    """Sums mod 2**16, uint16, and in 256, int16 -> sums, as two vectors of int32."""
    words = f"uint16x{_WORDS}"
    high = let(T.reinterpret(words, high))
    lacking = let(low - T.shift_left(high, splat(8, "uint16", _WORDS)))
    zero, eight = splat(0, "uint16", _WORDS), splat(8, "int32", _WORDS // 2)
    found = []
    for shift in (0, 4):
        order = [h + shift + i // 2 + i % 2 * _WORDS for h in (0, 8) for i in range(8)]
        in_256 = T.reinterpret(f"int32x{_WORDS // 2}", T.Shuffle([zero, high], order))
        rest = T.reinterpret(f"int32x{_WORDS // 2}", T.Shuffle([lacking, zero], order))
        found.append(let(T.shift_right(in_256, eight) + rest))
    return found


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    return {name: (value,) for name, value in default_knobs(shape, isa).items()}


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    return {"mr": turned_bytes.lane_rows(shape.m), "nv": 1}
