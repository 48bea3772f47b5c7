"""Linear layers with sparse int8 weights on 8-bit activations: columns of 16 channels by one k.

What ``by_row`` computes, to the same bits. Of each 16 output channels, only the k at which any of
them has a weight that is not zero are stored; a mask says which these are. For one row, the
activations that the mask keeps are put together once, and are then a dense dot product with the
weights of each of the channels, two of which share what is loaded. Where there are many rows, they
come turned, a vector holding a k of as many rows as there are lanes, and weights are scalars.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.isa._compacting import Compacting
from slmtvm.schedules.isa.base import Buffer, Expr, let, load, splat
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.linear import by_row
from slmtvm.schedules.linear.blocks import centred, without_zero_points
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace
from slmtvm.schedules.linear.scheme import Weights
from slmtvm.schedules.linear.shape import COLUMNS, LinearShape
from slmtvm.schedules.linear.tile import Registers, Store, Tile, split

CHANNELS = 16
"""Output channels of a column."""

MAX_K = 8192
"""Where values are put together is memory of a thread's stack."""

_GROUP = 4  # channels that share activations in registers
_STEP = 64  # k of a list that are multiplied at a time
_HALF = 32  # of which the last step may have so many; lists are padded to these
_WORD = 16  # k that a word of a mask says of
_TURNED = 64  # of k, that a block turns
_SHARING = 2  # channels that share a vector of rows
_UNROLLED = 8  # k of a list whose rows are multiplied without a loop

_PUTTING_TOGETHER = 0.09
"""Of the dense kernel's time, whatever is kept; of instructions."""

operands = by_row.operands


def turns(m: int, isa: Isa) -> bool:
    """Whether so many rows come turned: they fill a vector."""
    return m >= isa.lanes


def activations(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """Those of ``by_row``; where they are ``turned``, xt as ``turning`` makes it for xq."""
    found = by_row.activations(shape, isa)
    return [_turned_tensor(shape, isa), *found[1:]] if shape.turned else found


def _turned_tensor(shape: LinearShape, isa: Isa) -> Tensor:
    """(row blocks, padded_k, lanes)."""
    return Tensor("xt", (-(-shape.m // isa.lanes), shape.padded_k, isa.lanes), isa.row_dtype)


def weight_tensors(shape: LinearShape, isa: Isa) -> list[Tensor]:
    """starts int32 (lists + 1): at which half of a step of ``columns`` each list begins; masks
    uint16 (lists, padded_k / 16): the k of a list by bits from the lowest on; fills uint16 (lists,
    pieces): how many k of a list lie before each of the ``pieces``; columns int8
    (steps of all lists, 16, 32): each list as (pairs of channels, steps, 2, 32), zeros behind its
    end; then what ``by_row`` has beside the weight."""
    lists = isa.panels(shape.n) * isa.panel // CHANNELS
    most = lists * -(-shape.padded_k // _HALF)
    return [
        Tensor("starts", (lists + 1,), "int32"),
        Tensor("masks", (lists, shape.padded_k // _WORD), "uint16"),
        Tensor("fills", (lists, len(pieces(shape))), "uint16"),
        Tensor("columns", (most, CHANNELS, _HALF), "int8", at_most=True),
        *by_row.weight_tensors(shape, isa)[1:],
    ]


_PIECES = (64, 32, 16)


def pieces(shape: LinearShape) -> list[tuple[int, int]]:
    """(first k, how many) that are put together at once."""
    found, at = [], 0
    for size in _PIECES:
        while shape.padded_k - at >= size:
            found.append((at, size))
            at += size
    return found


def pack(shape: LinearShape, isa: Isa, weights: Weights) -> list[np.ndarray]:
    """As ``by_row`` takes them; zero points are taken off the weights, see ``blocks.centred``."""
    whole, *beside, _ = by_row.padded(shape, isa, without_zero_points(shape, weights))
    by_list = whole.reshape(-1, CHANNELS, shape.padded_k)
    used = (by_list != 0).any(axis=1)
    bits = np.packbits(used.reshape(len(used), -1, _WORD), axis=2, bitorder="little")
    masks = bits.view("<u2")[:, :, 0]
    fills = np.stack([used[:, :at].sum(axis=1) for at, _ in pieces(shape)], axis=1)
    halves = -(-used.sum(axis=1) // _HALF)
    starts = np.concatenate([[0], halves.cumsum()]).astype(np.int32)
    lists = [_listed(part[:, kept]) for part, kept in zip(by_list, used, strict=True)]
    if not starts[-1]:  # an array has to hold something; no list has this step
        lists.append(np.zeros(CHANNELS * _HALF, np.int8))
    columns = np.concatenate(lists).reshape(-1, CHANNELS, _HALF)
    return [starts, masks, fills.astype(np.uint16), columns, *beside]


def _listed(kept: np.ndarray) -> np.ndarray:
    """Weights of a list (16, k) -> as ``columns`` has them, in one row."""
    kept = np.pad(kept, ((0, 0), (0, -kept.shape[1] % _HALF)))
    whole = kept.shape[1] // _STEP * _STEP
    groups = kept.reshape(CHANNELS // _GROUP, _GROUP, -1)
    parts = [groups[:, :, at : at + _STEP] for at in range(0, whole, _STEP)]
    parts += [groups[:, :, whole:]]
    flat = [part.reshape(len(groups), -1) for part in parts]
    return np.concatenate(flat, axis=1).reshape(-1)


def fits(shape: LinearShape, weights: Weights) -> bool:
    """Whether the weights can be stored so: k is not too large, zero points can be taken off."""
    return shape.padded_k <= MAX_K and centred(weights) is not None


def density(shape: LinearShape, weights: Weights) -> float:
    """Which part of the weights is stored, the padding of channels and lists left out: 0..1."""
    weight = without_zero_points(shape, weights).weight
    used = np.pad(weight != 0, ((0, -len(weight) % CHANNELS), (0, 0)))
    return float(used.reshape(-1, CHANNELS, used.shape[1]).any(axis=1).mean())


def relative_time(shape: LinearShape, isa: Isa, density: float) -> float:
    """What the kernel is expected to take, of the dense kernel's time."""
    assert isa.column_costs is not None, isa.name
    if turns(shape.m, isa):
        cost = isa.column_costs[2]
        filled = -(-shape.m // isa.lanes) * isa.lanes / shape.m
        return (density * cost.step + cost.ends / shape.padded_k) * filled
    cost = isa.column_costs[shape.m > 1]
    return _PUTTING_TOGETHER + density * cost.step + cost.ends / shape.padded_k


def bytes_left(density: float) -> float:
    """Bytes of columns and masks, of those of all weights."""
    return density + 1 / 8 / CHANNELS


def layout(shape: LinearShape, isa: Isa) -> str:
    """See ``linear.layout``."""
    return f"{COLUMNS}{CHANNELS}x{_STEP}-panel{isa.panel}-{shape.format}-row_u8"


def emit(
    shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    assert tile.vectors == 1 and tile.isa.lanes % CHANNELS == 0, (knobs, tile.isa.name)
    of_rows = _sums_of_turned if shape.turned else _sums_of_a_row
    of_rows(shape, tile, named, store)


def _groups(
    tile: Tile,
    named: Mapping[str, Buffer],
    begin_list: Callable[[Expr], None],
    emit: Callable[[Expr, Expr, Expr], None],
) -> None:
    """``begin_list(list)`` for each list of a panel, then for each group of its channels
    ``emit(first channel of the tile, where its weights begin, halves of steps)``."""
    with T.serial(tile.isa.lanes // CHANNELS) as part:
        number = let(T.floordiv(tile.channel(0), CHANNELS) + part)
        begin = let(named["starts"][number])
        halves = let(named["starts"][number + 1] - begin)
        begin_list(number)
        with T.serial(CHANNELS // _GROUP) as group:
            at = let(begin * (CHANNELS * _HALF) + group * halves * (_GROUP * _HALF))
            emit(let(part * CHANNELS + group * _GROUP), at, halves)


def _steps(begin: Expr, halves: Expr, emit: Callable[[Expr, Expr, int], None]) -> None:
    """``emit(where weights are, first k of the list, how many)`` for each step of a group: those of
    each channel lie behind those of the one before it. Offsets are int64, which LLVM takes apart.
    """
    whole = let(T.floordiv(halves, 2))
    begin = let(T.Cast("int64", begin))
    with T.serial(whole) as step:
        wide = T.Cast("int64", step)
        emit(let(begin + wide * (_GROUP * _STEP)), let(wide * _STEP), _STEP)
    with T.If(T.floormod(halves, 2) == 1), T.Then():
        wide = T.Cast("int64", whole)
        emit(let(begin + wide * (_GROUP * _STEP)), let(wide * _STEP), _HALF)


def _put_together(
    shape: LinearShape,
    compacting: Compacting,
    named: Mapping[str, Buffer],
    number: Expr,
    near: Buffer,
    values: Callable[[Expr, int], Expr],
) -> None:
    """Write of ``values(first k, how many)`` those that list ``number`` has into ``near``; zeros
    behind them, up to half a step at least."""
    all_pieces = pieces(shape)
    first_mask = let(number * (shape.padded_k // _WORD))
    first_fill = let(number * len(all_pieces))

    def piece(index: Expr, at: Expr, size: int) -> None:
        words = size // _WORD
        mask = let(first_mask + T.floordiv(at, _WORD))
        kept = compacting.together(
            values(at, size),
            load(named["masks"], mask, words) if words > 1 else named["masks"][mask],
        )
        to = let(T.Cast("int32", named["fills"][first_fill + index]))
        T.buffer_store(near, kept, [T.ramp(to, 1, size)])
        if size < _HALF:
            T.buffer_store(near, splat(0, str(near.dtype), size), [T.ramp(to + size, 1, size)])

    whole = sum(size == _PIECES[0] for _, size in all_pieces)
    if whole:
        with T.serial(whole) as index:
            piece(index, let(index * _PIECES[0]), _PIECES[0])
    for index, (at, size) in enumerate(all_pieces[whole:], whole):
        piece(T.int32(index), T.int32(at), size)


def _sums_of_a_row(
    shape: LinearShape, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    assert tile.rows == 1, tile
    isa = tile.isa
    compacting = isa.compacting()
    near = T.alloc_buffer((shape.padded_k + _STEP,), isa.row_dtype, scope="local")
    sums = T.alloc_buffer((isa.lanes,), "int32", scope="local")
    row = let(tile.row(0) * shape.padded_k)

    def begin_list(number: Expr) -> None:
        def values(at: Expr, size: int) -> Expr:
            return load(named["xq"], row + at, size)

        _put_together(shape, compacting, named, number, near, values)

    def of_group(channel: Expr, begin: Expr, halves: Expr) -> None:
        carried = Registers("int32", compacting.sum_lanes, _GROUP)

        def step(at: Expr, k: Expr, count: int) -> None:
            x = let(load(near, k, count))
            for first in range(0, _GROUP, 2):
                products = [
                    _products(load(named["columns"], at + c * count, count), x, count)
                    for c in (first, first + 1)
                ]
                for c, product in enumerate(products, first):
                    carried[c] = compacting.add_lanes(carried[c], product)

        _steps(begin, halves, step)
        for c in range(_GROUP):
            T.buffer_store(sums, compacting.first(carried[c]), [channel + c])

    _groups(tile, named, begin_list, of_group)
    by_row.write(tile, named, {(0, 0): let(load(sums, 0, isa.lanes))}, store)


def _products(weights: Expr, x: Expr, count: int) -> Expr:
    """int16, which holds 128 * 128."""
    wide = f"int16x{count}"
    return let(T.Cast(wide, weights) * T.Cast(wide, x))


def _sums_of_turned(
    shape: LinearShape, tile: Tile, named: Mapping[str, Buffer], store: Store
) -> None:
    isa, lanes = tile.isa, tile.isa.lanes
    compacting = isa.compacting()
    near = T.alloc_buffer((shape.padded_k + _STEP,), "uint16", scope="local")
    # (rows, channels): sums are written as they are found, a channel at a time.
    sums = T.alloc_buffer((lanes * lanes,), "int32", scope="local")
    start = let(T.Cast("int64", tile.first_row) * shape.padded_k)  # of the row block in xt

    def begin_list(number: Expr) -> None:
        def places(at: Expr, size: int) -> Expr:
            counted = T.Ramp(T.IntImm("uint16", 0), T.IntImm("uint16", 1), size)
            return T.Broadcast(T.Cast("uint16", at), size) + counted

        _put_together(shape, compacting, named, number, near, places)

    def of_group(channel: Expr, begin: Expr, halves: Expr) -> None:
        for first in range(0, _GROUP, _SHARING):
            carried = Registers("int32", lanes, _SHARING)

            def step(
                at: Expr, k: Expr, count: int, first: int = first, carried: Registers = carried
            ) -> None:
                with T.serial(count // _UNROLLED) as part:
                    offset = let(T.Cast("int64", part) * _UNROLLED)
                    weights = let(at + first * count + offset)
                    listed = let(k + offset)
                    for i in range(_UNROLLED):
                        place = let(start + T.Cast("int64", near[listed + i]) * lanes)
                        rows = let(T.Cast(f"int16x{lanes}", load(named["xt"], place, lanes)))
                        for c in range(_SHARING):
                            weight = T.Cast("int16", named["columns"][weights + c * count + i])
                            carried[c] = carried[c] + _wide(rows) * _wide(
                                T.Broadcast(weight, lanes)
                            )

            _steps(begin, halves, step)
            for c in range(_SHARING):
                compacting.store_apart(sums, let(channel + first + c), lanes, carried[c])

    def _wide(values: Expr) -> Expr:
        return T.Cast(f"int32x{lanes}", values)

    _groups(tile, named, begin_list, of_group)
    with T.serial(tile.rows) as row:
        one = dataclasses.replace(tile, rows=1, first_row=let(tile.first_row + row))
        by_row.write(one, named, {(0, 0): let(load(sums, row * lanes, lanes))}, store)


def turning(shape: LinearShape, isa: Isa) -> Kernel:
    """xq as ``by_row`` has it -> xt as ``activations`` says; rows beyond m are zeros."""
    m, k, lanes = shape.m, shape.padded_k, isa.lanes
    parts = -(-k // _TURNED)
    compacting = isa.compacting()

    def body(block: Expr, xq: Buffer, xt: Buffer) -> None:
        row_block, part = let(T.floordiv(block, parts)), let(T.floormod(block, parts))
        first = let(row_block * lanes)
        count = let(T.min(T.int32(lanes), m - first))

        def turn(size: int) -> None:
            with T.serial(size) as i:
                at = let(part * _TURNED + i)
                rows = compacting.load_apart(xq, first * k + at, k, count)
                T.buffer_store(xt, rows, [T.ramp((row_block * k + at) * lanes, 1, lanes)])

        split(k, _TURNED, part, turn)

    tensors = [by_row.activations(shape, isa)[0], _turned_tensor(shape, isa)]
    name = f"turn_columns_{isa.row_dtype}_{isa.name}_m{m}_k{k}"
    return define(name, tensors, body, grid=-(-m // lanes) * parts, outputs=["xt"])


def knob_space(shape: LinearShape, isa: Isa) -> KnobSpace:
    return {name: (value,) for name, value in default_knobs(shape, isa).items()}


def default_knobs(shape: LinearShape, isa: Isa) -> Knobs:
    return {"mr": isa.lanes if shape.turned else 1, "nv": 1}
