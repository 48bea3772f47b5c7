"""The frame that every linear kernel shares: output tiles, their registers, their stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.isa.base import Buffer, Expr, Isa, let, load, splat
from slmtvm.schedules.kernel import Kernel, Tensor, Work, define
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.linear.shape import LinearShape


@dataclass(frozen=True)
class Tile:
    """``rows`` rows by ``channels`` output channels of y, computed in registers by one block.

    The channels start at lane ``first_lane`` of ``first_panel``; they are whole panels, or vectors
    of one panel. Where it is ``paired``, tiles of an even number and the one after them are of
    neighbouring rows and the same channels, and of as many rows.
    """

    isa: Isa
    rows: int
    channels: int
    first_row: Expr
    first_panel: Expr
    first_lane: Expr
    paired: bool = field(default=False, kw_only=True)

    @property
    def vectors(self) -> int:
        """Vectors of output channels; the last may hold padding."""
        return -(-self.channels // self.isa.lanes)

    def panel(self, vector: int) -> Expr:
        """The panel that a vector's channels lie in."""
        return self.first_panel + vector // self.isa.vectors

    def lane(self, vector: int) -> Expr:
        """The place of a vector's first channel in its panel."""
        return self.first_lane + vector % self.isa.vectors * self.isa.lanes

    def row(self, index: int) -> Expr:
        """The row of activations that row ``index`` of the tile reads."""
        return self.first_row + index

    def row_of_y(self, index: int) -> Expr:
        """The row of y, and of the residual, that row ``index`` of the tile is."""
        return self.row(index)

    def channel(self, vector: int) -> Expr:
        """The output channel that a vector begins with."""
        return self.panel(vector) * self.isa.panel + self.lane(vector)

    def bias(self, vector: int) -> Expr:
        """Where the bias of a vector begins."""
        return self.channel(vector)

    def cells(self) -> list[tuple[int, int]]:
        """Every (row, vector) of the tile."""
        return [(r, v) for r in range(self.rows) for v in range(self.vectors)]


class Registers:
    """Vectors that live across iterations of a loop; LLVM keeps them in registers."""

    def __init__(self, dtype: str, lanes: int, count: int) -> None:
        self._lanes = lanes
        self._buffer = T.alloc_buffer((count * lanes,), dtype, scope="local")
        for index in range(count):
            self[index] = splat(0, dtype, lanes)

    def __getitem__(self, index: int) -> Expr:
        return let(load(self._buffer, index * self._lanes, self._lanes))

    def __setitem__(self, index: int, value: Expr) -> None:
        T.buffer_store(self._buffer, value, [T.ramp(index * self._lanes, 1, self._lanes)])


EmitTile = Callable[[Tile, Mapping[str, Buffer], "Store"], None]
"""Emits the code of one tile, given the kernel's buffers by name."""

Frame = Callable[[LinearShape, Isa, Knobs, list[Tensor], EmitTile], Kernel]
"""What puts tiles over a matrix: its arguments are those of ``define_tiled``."""


def define_tiled(
    shape: LinearShape, isa: Isa, knobs: Knobs, inputs: list[Tensor], emit: EmitTile
) -> Kernel:
    """A kernel whose block is one tile of ``knobs["mr"]`` rows by ``knobs["nv"]`` vectors, which
    divide a panel or are whole panels.

    Blocks that share weights are neighbours, so that a panel is read from memory once; of lists,
    blocks that share activations, which are read wherever a list says. ``emit``
    writes the code of one tile; it runs once for whole tiles and once for each kind of remainder.
    """
    mr, width = min(knobs["mr"], shape.m), knobs["nv"] * isa.lanes
    assert isa.panel % width == 0 or width % isa.panel == 0, (knobs, isa.name)
    row_blocks, column_blocks = -(-shape.m // mr), -(-shape.n // width)
    paired = row_blocks % 2 == 0 and shape.m % mr == 0
    scratch = [t for t in inputs if t.name == "scratch"]
    tensors = [*(t for t in inputs if t not in scratch), *output_tensors(shape), *scratch]

    def body(block: Expr, *arguments: Expr) -> None:
        buffers, valid = arguments[: len(tensors)], arguments[len(tensors) :]
        named = dict(zip((t.name for t in tensors), buffers, strict=True))
        store = Store(shape.n, named["y"], named.get("bias"), named.get("residual"))
        isa.align_stack()
        if shape.in_lists or shape.in_turned_pairs:
            row_block = let(T.floordiv(block, column_blocks))
            column_block = let(T.floormod(block, column_blocks))
        else:
            row_block = let(T.floormod(block, row_blocks))
            column_block = let(T.floordiv(block, row_blocks))

        def rows_of(rows: int) -> None:
            def tile(channels: int, panel: Expr, lane: Expr) -> None:
                first = let(row_block * mr)
                made = Tile(isa, rows, channels, first, panel, lane, paired=paired)
                if not valid:
                    emit(made, named, store)
                    return
                with T.If(first < valid[0]):
                    with T.Then():
                        emit(made, named, store)
                    with T.Else():
                        store.clear(made)

            split_channels(isa, shape.n, width, column_block, tile)

        split(shape.m, mr, row_block, rows_of)

    return define(
        shape.kernel_name(isa.name, knobs),
        tensors,
        body,
        grid=row_blocks * column_blocks,
        outputs=["y"],
        scalars=["valid"] if shape.padded else [],
        work=Work(multiply_adds=shape.m * shape.n * shape.k),
    )


def output_tensors(shape: LinearShape) -> list[Tensor]:
    """What a kernel adds to its sums, and y."""
    tensors = []
    if shape.has_bias:
        tensors.append(Tensor("bias", (shape.n,), "float32"))
    if shape.has_residual:
        tensors.append(Tensor("residual", (shape.m, shape.n), "float32"))
    return [*tensors, Tensor("y", (shape.m, shape.n), "float32")]


def split(total: int, size: int, index: Expr, emit: Callable[[int], None]) -> None:
    """``emit(size)`` for the whole pieces of ``total``, ``emit(remainder)`` for the last."""
    whole, remainder = divmod(total, size)
    if not remainder:
        emit(size)
    elif not whole:
        emit(remainder)
    else:
        with T.If(index < whole):
            with T.Then():
                emit(size)
            with T.Else():
                emit(remainder)


def split_channels(
    isa: Isa, n: int, width: int, index: Expr, emit: Callable[[int, Expr, Expr], None]
) -> None:
    """``emit(channels, first panel, first lane)`` for piece ``index`` of n channels, each ``width``
    wide but for the last."""

    def piece(channels: int) -> None:
        first = index * width
        panel, lane = let(T.floordiv(first, isa.panel)), let(T.floormod(first, isa.panel))
        if width % isa.panel == 0:  # written out, for addresses to be constants where they can
            panel, lane = let(index * (width // isa.panel)), 0
        emit(channels, panel, lane)

    split(n, width, index, piece)


@dataclass(frozen=True)
class Store:
    """Writes vectors of y, with bias and residual added."""

    n: int
    y: Buffer
    bias: Buffer | None
    residual: Buffer | None

    def addends(self, tile: Tile, row: int, vector: int) -> list[Expr]:
        """The vectors to add to ``y[row, vector]``: bias, then residual, where there are any."""
        count, lanes = self._count(tile, vector), tile.isa.lanes
        found = []
        if self.bias is not None:
            found.append(_load_first(self.bias, tile.bias(vector), count, lanes))
        if self.residual is not None:
            at = tile.row_of_y(row) * self.n + tile.channel(vector)
            found.append(_load_first(self.residual, at, count, lanes))
        return found

    def write(self, tile: Tile, row: int, vector: int, value: Expr) -> None:
        """``y[row, vector] = value``, without the padding lanes."""
        count, lanes = self._count(tile, vector), tile.isa.lanes
        at = tile.row_of_y(row) * self.n + tile.channel(vector)
        if count == lanes:
            T.buffer_store(self.y, value, [T.ramp(at, 1, lanes)])
            return
        staged = T.alloc_buffer((lanes,), "float32", scope="local")
        T.buffer_store(staged, value, [T.ramp(0, 1, lanes)])
        with T.serial(count) as lane:
            T.buffer_store(self.y, staged[lane], [at + lane])

    def clear(self, tile: Tile) -> None:
        """``y = 0`` in all of a tile, in little code."""
        lanes = tile.isa.lanes
        whole, zeros = tile.channels // lanes, splat(0.0, "float32", lanes)
        with T.serial(tile.rows) as row:
            first = let(tile.row_of_y(row) * self.n)
            if whole:
                with T.serial(whole) as vector:
                    at = let(first + tile.channel(vector))
                    T.buffer_store(self.y, zeros, [T.ramp(at, 1, lanes)])
            if tile.channels % lanes:
                with T.serial(tile.channels % lanes) as lane:
                    at = let(first + tile.channel(whole) + lane)
                    T.buffer_store(self.y, T.float32(0), [at])

    def add_and_write(self, tile: Tile, row: int, vector: int, value: Expr) -> None:
        """``y[row, vector] = value + bias + residual``."""
        for addend in self.addends(tile, row, vector):
            value = let(value + addend)
        self.write(tile, row, vector, value)

    def _count(self, tile: Tile, vector: int) -> int:
        return min(tile.isa.lanes, tile.channels - vector * tile.isa.lanes)


def _load_first(buffer: Buffer, at: Expr, count: int, lanes: int) -> Expr:
    """``lanes`` floats from ``at``; only the first ``count`` may be read, the rest are 0."""
    if count == lanes:
        return let(load(buffer, at, lanes))
    staged = T.alloc_buffer((lanes,), "float32", scope="local")
    T.buffer_store(staged, splat(0.0, "float32", lanes), [T.ramp(0, 1, lanes)])
    with T.serial(count) as lane:
        T.buffer_store(staged, buffer[at + lane], [lane])
    return let(load(staged, 0, lanes))
