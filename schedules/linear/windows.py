"""Linear layers with sparse int8 weights on 8-bit activations: so many of every window of k.

What ``by_row`` computes, to the same bits. Of each window of ``Window.size`` consecutive k, each
channel has ``Window.kept`` weights, zeros among them where it has fewer. A weight's place, the
activation of the window that it meets, is a nibble: places of one half of a panel's channels are
the lower halves of bytes, those of the other half the upper ones. The products of the weights left
out are 0, whatever the activations are, so that the integer sums lack nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import WINDOWS, Isa, Picking, Window
from slmtvm.schedules.isa.base import Buffer, Expr, Vectors, let, load, prefetch
from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.linear import by_row
from slmtvm.schedules.linear.blocks import LINE_BYTES, PREFETCH_BYTES, centred, without_zero_points
from slmtvm.schedules.linear.integer import Sums
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace, row_knobs
from slmtvm.schedules.linear.scheme import Weights
from slmtvm.schedules.linear.shape import LinearShape
from slmtvm.schedules.linear.tile import Registers, Store, Tile

_STEP = 4  # weights of a channel that are multiplied together

_CHAINS = 4
"""States that take turns, at least, where registers are left."""

_MOST_PANELS, _MIN_BLOCKS = 4, 4  # of a tile of one row; of a matrix, for threads to share

activations = by_row.activations
operands = by_row.operands


def weight_tensors(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """weight int8 (panels, windows, steps, bytes): a panel's weights, then its places; missing
    int32 (panels, isa.panel), what sums lack, where they lack anything; then what ``by_row`` has
    beside the weight."""
    isa = isa.for_blocks
    window, panels = WINDOWS[shape.window], isa.panels(shape.n)
    steps = window.kept // _STEP
    size = _bytes_of_step(isa)
    tensors = [Tensor("weight", (panels, shape.padded_k // window.size, steps, size), "int8")]
    if _lacks(isa.picking(window)):
        tensors.append(Tensor("missing", (panels, isa.panel), "int32"))
    return [*tensors, *by_row.weight_tensors(shape, isa)[1:]]


def pack(shape: LinearShape, isa: Isa, weights: Weights) -> list[np.ndarray]:
    """As ``by_row`` takes them, of which ``fits`` holds; zero points are taken off the weights."""
    isa = isa.for_blocks
    window = WINDOWS[shape.window]
    picking = isa.picking(window)
    whole, *beside, _ = by_row.padded(shape, isa, without_zero_points(shape, weights))
    channels = len(whole)
    split = whole.reshape(channels, -1, window.size)
    # The places of what is not zero come first, in order of k.
    order = np.argsort(split == 0, axis=2, kind="stable")[:, :, : window.kept]
    kept = np.take_along_axis(split, order, axis=2)
    assert int((kept != 0).sum()) == int((whole != 0).sum()), shape
    places = order.astype(np.uint8)
    if picking.signs:
        places |= (kept < 0).astype(np.uint8) << 3
        kept = np.abs(kept.astype(np.int16)).astype(np.uint8).view(np.int8)
    steps = window.kept // _STEP
    by_step = (channels // isa.panel, isa.panel, -1, steps, _STEP)
    values, nibbles = (a.reshape(by_step).transpose(0, 2, 3, 1, 4) for a in (kept, places))
    half = isa.panel // 2
    packed = nibbles[..., :half, :] | nibbles[..., half:, :] << 4
    flat = [
        np.ascontiguousarray(a).reshape(*a.shape[:3], -1).view(np.int8) for a in (values, packed)
    ]
    missing = picking.missing(whole)
    lacking = [] if missing is None else [missing.reshape(-1, isa.panel)]
    return [np.concatenate(flat, axis=3), *lacking, *beside]


def fits(window: Window, weights: Weights) -> bool:
    """Whether no channel has more weights in a window than it keeps, zero points taken off."""
    plain = centred(weights)
    if plain is None:
        return False
    used = plain.weight != 0
    used = np.pad(used, ((0, 0), (0, -used.shape[1] % window.size)))
    counts = used.reshape(len(used), -1, window.size).sum(axis=2)
    return bool((counts <= window.kept).all())


def relative_time(window: str, isa: Isa, m: int) -> float:
    """What the kernel of m rows is expected to take, of the dense kernel's time where the weights
    are in cache; where they are read from memory it is less, on the ISAs known here."""
    return isa.window_times[window][m > 1]


def bytes_left(window: Window) -> float:
    """Bytes of weights and places, of those of all weights."""
    return 1.5 * window.kept / window.size


def layout(shape: LinearShape, isa: Isa) -> str:
    """See ``linear.layout``."""
    picking = isa.picking(WINDOWS[shape.window])
    lacks = "-missing" if _lacks(picking) else ""
    return f"{shape.window}-panel{isa.for_blocks.panel}{lacks}-{shape.format}-row_u8"


def _lacks(picking: Picking) -> bool:
    return picking.missing(np.zeros((1, 1), np.int8)) is not None


def _bytes_of_step(isa: Isa) -> int:
    return isa.panel * _STEP * 3 // 2


def emit(
    shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    isa, unroll = tile.isa, knobs["ku"]
    window = WINDOWS[shape.window]
    picking = isa.picking(window)
    cells = tile.cells()
    width = len(picking.state)
    windows = shape.padded_k // window.size
    chains = max(1, min(unroll, _CHAINS // len(cells)))
    carried = Registers("int32", isa.lanes, chains * len(cells) * width)

    def state(index: int) -> Vectors:
        return tuple(carried[index * width + i] for i in range(width))

    def multiply(begin: Expr, number: int) -> None:
        states = [state(index) for index in range(chains * len(cells))]
        size = window.kept // _STEP * _bytes_of_step(isa)
        for panel in range(-(-tile.vectors // isa.vectors) if knobs["pf"] else 0):
            at = ((tile.first_panel + panel) * windows + begin) * size
            for line in range(0, number * size, LINE_BYTES):
                prefetch(named["weight"], at + line + knobs["pf"] * PREFETCH_BYTES)
        for i in range(number):
            _window(tile, named, window, picking, begin + i, windows, states, i)
        for index, after in enumerate(states):
            for i, vector in enumerate(after):
                carried[index * width + i] = vector

    def rounds(first: int, count: int, each: int) -> None:
        if count == 1:
            multiply(first, each)
        elif count:
            with T.serial(count) as part:
                multiply(let(first + part * each), each)

    whole = windows // unroll
    rounds(0, whole, unroll)
    rounds(whole * unroll, windows - whole * unroll, 1)
    sums: Sums = {}
    for index, (row, v) in enumerate(cells):
        total = picking.finish(state(index))
        for chain in range(1, chains):
            total = let(total + picking.finish(state(chain * len(cells) + index)))
        if "missing" in named:
            total = let(total + by_row.by_channel(tile, named["missing"], v))
        sums[row, v] = total
    by_row.write(tile, named, sums, store)


def _window(
    tile: Tile,
    named: Mapping[str, Buffer],
    window: Window,
    picking: Picking,
    index: Expr,
    windows: int,
    states: list[Vectors],
    turn: int,
) -> None:
    """Add window ``index`` to the ``states`` of the tile's cells whose turn it is."""
    isa, cells = tile.isa, tile.cells()
    size, steps = _bytes_of_step(isa), window.kept // _STEP
    raw, half = isa.lanes * _STEP, isa.panel * _STEP // 2
    at = let(index * window.size)
    rows = [
        picking.row(named["xq"], tile.row(r) * windows * window.size + at) for r in range(tile.rows)
    ]
    chain = turn % (len(states) // len(cells)) * len(cells)
    for step in range(steps):
        places: dict[tuple[int, int], tuple[Expr, Expr]] = {}
        for v in range(tile.vectors):
            panel = v // isa.vectors
            begin = ((tile.first_panel + panel) * windows + index) * (steps * size) + step * size
            within = v % isa.vectors * raw
            if (panel, within % half) not in places:
                stored = load(named["weight"], begin + 2 * half + within % half, raw)
                places[panel, within % half] = picking.places(stored)
            weight = picking.weights(load(named["weight"], begin + within, raw))
            for r in range(tile.rows):
                cell = chain + r * tile.vectors + v
                states[cell] = picking.step(
                    states[cell], weight, places[panel, within % half][within // half], rows[r]
                )


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    whole = isa.for_blocks.vectors
    vectors = tuple(whole * i for i in (1, 2, _MOST_PANELS) if shape.m == 1 or i < _MOST_PANELS)
    return {"mr": (1, 2, 3, 4, 6, 8), "nv": vectors, "ku": (1, 2, 4), "pf": (0, 1, 2, 8)}


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    """For one row, several panels: memory is faster where several streams of it are read."""
    isa = isa.for_blocks
    width = len(isa.picking(WINDOWS[shape.window]).state)
    registers = isa.registers // 2 // width
    if shape.m == 1:
        panels = min(registers // isa.vectors, isa.panels(shape.n) // _MIN_BLOCKS, _MOST_PANELS)
        return {"mr": 1, "nv": isa.vectors << max(panels, 1).bit_length() - 1, "ku": 2, "pf": 0}
    return {"mr": row_knobs(shape.m, registers // isa.vectors), "nv": isa.vectors, "ku": 1, "pf": 0}
