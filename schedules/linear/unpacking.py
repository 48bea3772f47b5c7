"""Weights of fewer than 8 bits, unpacked once for all the rows of a block.

A block of ``define_unpacked`` is tiles above each other. Their weights lie unpacked in scratch, as
operands of steps: for each step a vector of bytes for each vector of channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa import Dot, Isa
from slmtvm.schedules.isa.base import Buffer, Expr, Row, Vectors, let, load, prefetch
from slmtvm.schedules.kernel import Kernel, Tensor, Work, define
from slmtvm.schedules.linear.knobs import Knobs, ahead
from slmtvm.schedules.linear.shape import LinearShape
from slmtvm.schedules.linear.tile import EmitTile, Store, Tile, output_tensors, split_channels


@dataclass(frozen=True)
class Unpacked(Dot):
    """``dot`` on weights that were unpacked before: one step for each load."""

    dot: Dot

    def __post_init__(self) -> None:
        for name in ("offset", "max_steps", "state"):
            object.__setattr__(self, name, getattr(self.dot, name))

    def weights(self, raw: Expr) -> tuple[Expr, ...]:
        return (let(raw),)

    def row(self, buffer: Buffer, at: Expr) -> Row:
        return self.dot.row(buffer, at)

    def activation(self, row: Row, k: int) -> Expr:
        return self.dot.activation(row, k)

    def step(self, state: Vectors | None, weight: Expr, activation: Expr) -> Vectors:
        return self.dot.step(state, weight, activation)

    def start(self, sums: Expr) -> Vectors | None:
        return self.dot.start(sums)

    def settle(self, state: Vectors) -> Vectors:
        return self.dot.settle(state)

    def finish(self, state: Vectors) -> Expr:
        return self.dot.finish(state)


def scratch_bytes(shape: LinearShape, isa: Isa, knobs: Knobs) -> int:
    """What the unpacked weights of a block take."""
    return shape.padded_k * knobs["nv"] * isa.lanes


def define_unpacked(
    shape: LinearShape, isa: Isa, knobs: Knobs, dot: Dot, inputs: list[Tensor], emit: EmitTile
) -> Kernel:
    """The kernel of ``define_tiled`` in blocks of ``knobs["rt"]`` tiles above each other; ``emit``
    finds the weights of a tile in "scratch"."""
    mr, width = min(knobs["mr"], shape.m), knobs["nv"] * isa.lanes
    assert isa.panel % width == 0 or width % isa.panel == 0, (knobs, isa.name)
    whole, remainder = divmod(shape.m, mr)
    tiles = min(knobs["rt"], whole)
    row_blocks, column_blocks = -(-whole // tiles), -(-shape.n // width)
    scratch = Tensor("scratch", (scratch_bytes(shape, isa, knobs),), "uint8")
    tensors = [*inputs, *output_tensors(shape), scratch]

    def body(block: Expr, *arguments: Expr) -> None:
        buffers, valid = arguments[: len(tensors)], arguments[len(tensors) :]
        named = dict(zip((t.name for t in tensors), buffers, strict=True))
        store = Store(shape.n, named["y"], named.get("bias"), named.get("residual"))
        isa.align_stack()
        row_block = let(T.floormod(block, row_blocks))
        column_block = let(T.floordiv(block, row_blocks))
        first = let(row_block * tiles)

        def columns(channels: int, panel: Expr, lane: Expr) -> None:
            def tile(rows: int, row: Expr) -> Tile:
                return Tile(isa, rows, channels, row, panel, lane)

            count = tiles if whole % tiles == 0 else let(T.min(tiles, whole - first))
            used = count
            if valid:
                some = T.floordiv(valid[0] + (mr - 1), mr) - first
                used = let(T.max(0, T.min(count, some)))
                with T.If(first * mr < valid[0]), T.Then():
                    _unpack(shape, knobs, dot, tile(0, 0), named)
                with T.serial(used, count) as i:
                    store.clear(tile(mr, let((first + i) * mr)))
            else:
                _unpack(shape, knobs, dot, tile(0, 0), named)
            with T.serial(used) as i:
                emit(tile(mr, let((first + i) * mr)), named, store)
            if remainder:
                with T.If(row_block == row_blocks - 1), T.Then():
                    last = tile(remainder, whole * mr)
                    if not valid:
                        emit(last, named, store)
                    else:
                        with T.If(whole * mr < valid[0]):
                            with T.Then():
                                emit(last, named, store)
                            with T.Else():
                                store.clear(last)

        split_channels(isa, shape.n, width, column_block, columns)

    return define(
        shape.kernel_name(isa.name, knobs),
        tensors,
        body,
        grid=row_blocks * column_blocks,
        outputs=["y"],
        scalars=["valid"] if shape.padded else [],
        work=Work(multiply_adds=shape.m * shape.n * shape.k),
    )


def _unpack(
    shape: LinearShape, knobs: Knobs, dot: Dot, tile: Tile, named: Mapping[str, Buffer]
) -> None:  # fmt: skip
    """The weights of the tile's channels into scratch; those of the next are asked for meanwhile
    where ``knobs["pf"]`` says so."""
    isa, steps = tile.isa, 8 // shape.bits
    further = ahead(knobs, knobs["nv"] * shape.stored_k * isa.panel // isa.vectors, 1)
    with T.serial(shape.padded_k // (steps * isa.k_step)) as part:
        for v in range(tile.vectors):
            at = tile.panel(v) * shape.stored_k * isa.panel
            at += (part * isa.panel + tile.lane(v)) * isa.k_step
            if further and v % isa.vectors == 0:
                prefetch(named["weight"], at + further)
            operands = dot.weights(load(named["weight"], at, isa.raw_bytes))
            for i, operand in enumerate(operands):
                place = ((part * steps + i) * tile.vectors + v) * isa.raw_bytes
                T.buffer_store(named["scratch"], operand, [T.ramp(place, 1, isa.raw_bytes)])
