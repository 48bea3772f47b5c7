"""Linear layers with int8 weights of which two of every four k are not 0, on 8-bit activations.

What ``by_row`` computes, to the same bits, for tensor cores that multiply such weights: each
channel's pairs of weights lie together, and 2 bits say where among its four each of them belongs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import PAIRS, Isa
from slmtvm.schedules.isa.base import Buffer, Expr, let
from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.linear import by_row
from slmtvm.schedules.linear.blocks import centred
from slmtvm.schedules.linear.integer import Sums
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace
from slmtvm.schedules.linear.packing import panels_of_fields
from slmtvm.schedules.linear.scheme import Weights
from slmtvm.schedules.linear.shape import LinearShape
from slmtvm.schedules.linear.tile import Registers, Store, Tile

UNIT = 64
"""What k must be a multiple of: tensor cores take so many at once."""

PLACES_UNIT = 32
"""Values of k whose places are a word of each channel."""

BYTES_LEFT = 0.5 + 0.125
"""Bytes of weights and places, of those of all weights."""

activations = by_row.activations
operands = by_row.operands
default_knobs = by_row.default_knobs


def weight_tensors(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """weight int8 (panels, k / 2, isa.panel), in the order of ``by_row``'s; places uint8 (panels,
    k / 32, isa.panel, 4), the first weight's in the lowest bits; then what ``by_row`` has beside
    the weight."""
    panels = isa.panels(shape.n)
    return [
        Tensor("weight", (panels, shape.k // 2, isa.panel), "int8"),
        Tensor("places", (panels, shape.k // PLACES_UNIT, isa.panel, 4), "uint8"),
        *by_row.weight_tensors(shape, isa)[1:],
    ]


def pack(shape: LinearShape, isa: Isa, weights: Weights) -> list[np.ndarray]:
    """As ``by_row`` takes them, of which ``fits`` holds; zero points are taken off the weights."""
    plain = centred(weights)
    assert plain is not None, shape
    whole, *beside, _ = by_row.padded(shape, isa, plain)
    split = whole.reshape(len(whole), -1, PAIRS.size)
    # What is not zero, and zeros where that is less than two, in order of k.
    order = np.argsort(split == 0, axis=2, kind="stable")[:, :, : PAIRS.kept]
    order.sort(axis=2)
    kept = np.take_along_axis(split, order, axis=2)
    assert int((kept != 0).sum()) == int((whole != 0).sum()), shape
    places = order.astype(np.uint8).reshape(len(whole), -1, 4)  # of a byte
    bytes_ = (places << np.arange(0, 8, 2, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
    first, second, *_ = (tensor.shape for tensor in weight_tensors(shape, isa))
    by_panel = bytes_.reshape(-1, isa.panel, second[1], 4).transpose(0, 2, 1, 3)
    return [
        panels_of_fields(kept.reshape(len(whole), -1), isa.panel, isa.k_step, 8).reshape(first),
        np.ascontiguousarray(by_panel),
        *beside,
    ]


def fits(shape: LinearShape, weights: Weights) -> bool:
    """Whether no channel has more than two weights in four, zero points taken off, and k is whole
    units."""
    plain = centred(weights)
    if plain is None or shape.k % UNIT:
        return False
    counts = (plain.weight != 0).reshape(len(plain.weight), -1, PAIRS.size).sum(axis=2)
    return bool((counts <= PAIRS.kept).all())


def layout(isa: Isa) -> str:
    """See ``linear.layout``."""
    return f"{PAIRS.name}-panel{isa.panel}-int8-row_u8"


def emit(
    shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    picking = tile.isa.row_pairs()
    sums = picking.of_tile(shape, tile, named) or _sums(shape, tile, named)
    by_row.write(tile, named, sums, store)


def _sums(shape: LinearShape, tile: Tile, named: Mapping[str, Buffer]) -> Sums:
    isa, cells = tile.isa, tile.cells()
    picking = isa.row_pairs()
    step = 2 * isa.k_step  # values of k
    totals = Registers("int32", isa.lanes, len(cells))
    with T.serial(shape.k // PLACES_UNIT) as part:
        begin = let(part * PLACES_UNIT)
        found: list[Expr] = [totals[i] for i in range(len(cells))]
        places = [
            picking.places(named["places"], places_at(shape, tile, v) + part * (4 * isa.panel))
            for v in range(tile.vectors)
        ]
        for number in range(PLACES_UNIT // step):
            rows = [
                picking.row(named["xq"], tile.row(r) * shape.padded_k + begin + number * step)
                for r in range(tile.rows)
            ]
            for v in range(tile.vectors):
                at = weight_at(shape, tile, v) + (part * (PLACES_UNIT // step) + number) * (
                    isa.k_step * isa.panel
                )
                weight = picking.weights(named["weight"], at)
                for r in range(tile.rows):
                    index = r * tile.vectors + v
                    found[index] = picking.step(found[index], weight, places[v], number, rows[r])
        for i, total in enumerate(found):
            totals[i] = total
    return {cell: totals[i] for i, cell in enumerate(cells)}


def weight_at(shape: LinearShape, tile: Tile, vector: int) -> Expr:
    """Where a vector's packed weights begin."""
    isa = tile.isa
    return tile.panel(vector) * (shape.k // 2 * isa.panel) + tile.lane(vector) * isa.k_step


def places_at(shape: LinearShape, tile: Tile, vector: int) -> Expr:
    """Where a vector's places begin."""
    isa = tile.isa
    each = shape.k // PLACES_UNIT * isa.panel * 4
    return tile.panel(vector) * each + tile.lane(vector) * 4


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    space = by_row.knob_space(shape, isa)
    return {**space, "ku": space["ku"][:1], "pf": (0,)}
