"""Linear layers whose weights are picked by the data: each pair's rows times its expert's matrix.

The kernels are those of ``schedules/linear`` on the experts' matrices stacked by output channels;
only which rows and which panels a tile takes is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import linear
from slmtvm.schedules.experts.grouping import Grouping
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.isa.base import Buffer, Expr, let
from slmtvm.schedules.kernel import Kernel, Tensor, Tunable, Work, define
from slmtvm.schedules.linear import LinearShape, Weights
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace
from slmtvm.schedules.linear.tile import EmitTile, Store, Tile, split_channels

Value = TypeVar("Value")


@dataclass(frozen=True)
class RoutedShape:
    """``y[p] = x[row of p] @ W[expert of p].T (+ bias[expert of p])`` for the pairs of m tokens.

    ``layer`` is one expert's layer, whose m and has_residual are not read. x has a row for each
    token, or where ``by_pair`` for each pair. Blocks of channels that share scales are no larger
    than an expert: they divide n.
    """

    m: int
    top_k: int
    experts: int
    layer: LinearShape
    by_pair: bool

    @property
    def pairs(self) -> int:
        return self.m * self.top_k

    def stacked(self, isa: Isa) -> LinearShape:
        """The layer of all experts side by side, each padded to whole panels."""
        return replace(
            self.layer, m=self.pairs if self.by_pair else self.m, has_residual=False,
            n=self.experts * isa.panels(self.layer.n) * isa.panel,
        )  # fmt: skip

    @property
    def of_one_expert(self) -> LinearShape:
        """A layer of as many rows as an expert gets if all get the same."""
        rows = 1 if self.m == 1 else max(2, -(-self.pairs // self.experts))
        return replace(self.layer, m=rows)

    def grouping(self, knobs: Knobs) -> Grouping | None:
        """How pairs come in tiles; None where each is a tile of its own, in order."""
        if self.m == 1:
            return None
        return Grouping(self.m, self.top_k, self.experts, knobs["mr"])

    def name(self, isa: Isa, knobs: Knobs) -> str:
        """A name that says all that the code depends on."""
        rows = "pairs" if self.by_pair else "tokens"
        one = replace(self.layer, m=self.m, has_residual=False).kernel_name(isa.name, knobs)
        return f"routed_{rows}_e{self.experts}_t{self.top_k}_{one}"


@dataclass(frozen=True)
class _Tile(Tile):
    """A tile of one expert: ``read`` and ``written`` are the rows of x and of y."""

    expert: Expr
    layer: LinearShape
    read: tuple[Expr, ...]
    written: tuple[Expr, ...]

    def panel(self, vector: int) -> Expr:
        return self.expert * self.isa.panels(self.layer.n) + super().panel(vector)

    def row(self, index: int) -> Expr:
        return self.read[index]

    def row_of_y(self, index: int) -> Expr:
        return self.written[index]

    def channel(self, vector: int) -> Expr:
        return super().panel(vector) * self.isa.panel + self.lane(vector)

    def bias(self, vector: int) -> Expr:
        return self.expert * self.layer.n + self.channel(vector)


def packed_names(shape: RoutedShape, isa: Isa) -> list[str]:
    """Names of the packed weights, in the order of the kernel's tensors."""
    return [t.name for t in linear.packed_weights(shape.stacked(isa), isa)]


def layout(shape: RoutedShape, isa: Isa) -> str:
    """Two targets for which this is equal share packed weights byte for byte."""
    return linear.layout(shape.stacked(isa), isa)


def pack(shape: RoutedShape, isa: Isa, weights: Weights) -> dict[str, np.ndarray]:
    """Weights as ``slm.routed_linear`` has them, (experts, n, ...), in the kernel's order."""
    channels = isa.panels(shape.layer.n) * isa.panel
    block = shape.layer.group_channels or 1
    assert shape.layer.n % block == 0, shape

    def stack(array: np.ndarray | None, rows: int = channels // block) -> np.ndarray | None:
        if array is None:
            return None
        padding = [(0, 0), (0, rows - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
        whole = np.pad(array, padding) if rows != array.shape[1] else array
        return whole.reshape(shape.experts * rows, *array.shape[2:])

    whole = stack(weights.weight, channels)
    assert whole is not None
    stacked = Weights(whole, stack(weights.scales), stack(weights.zero_points))
    return linear.pack(shape.stacked(isa), isa, stacked)


def knob_space(shape: RoutedShape, isa: Isa) -> KnobSpace:
    """Those of the experts' layers; ``mr`` is how many pairs of an expert a tile has."""
    return _of_tiles(linear.knob_space(shape.of_one_expert, isa))


def default_knobs(shape: RoutedShape, isa: Isa) -> Knobs:
    """The setting used where nothing was tuned."""
    return _of_tiles(linear.default_knobs(shape.of_one_expert, isa))


def _of_tiles(knobs: dict[str, Value]) -> dict[str, Value]:
    """``knobs`` without those of tiles above each other, which are of different experts here."""
    return {name: value for name, value in knobs.items() if name != "rt"}


def effective_knobs(shape: RoutedShape, isa: Isa, knobs: Knobs) -> Knobs:
    """``knobs`` as they are really used: of settings that make the same code, one."""
    rows = 1 if shape.m == 1 else shape.pairs
    return linear.effective_knobs(replace(shape.layer, m=rows), isa, knobs)


def build_linear(shape: RoutedShape, isa: Isa, knobs: Knobs | None = None) -> Kernel:
    """Tensors: the activations, as ``schedules.linear.build`` has them, a row for each token or
    pair; experts int32 (m, top_k) where m is 1, else tile_expert and tile_pairs of the grouping;
    the packed weights; bias (experts, n) where the layer has one; y float32 (m * top_k, n)."""
    settings = knobs or default_knobs(shape, isa)

    def frame(
        stacked: LinearShape, isa: Isa, knobs: Knobs, inputs: list[Tensor], emit: EmitTile
    ) -> Kernel:
        return _define(shape, isa, knobs, inputs, emit)

    kernel = linear.build(shape.stacked(isa), isa, settings, frame)
    return replace(kernel, tunable=Tunable("routed_linear", shape, settings))


def _define(
    shape: RoutedShape, isa: Isa, knobs: Knobs, inputs: list[Tensor], emit: EmitTile
) -> Kernel:
    layer, grouping = shape.layer, shape.grouping(knobs)
    width = knobs["nv"] * isa.lanes
    column_blocks = -(-layer.n // width)
    weights = len(packed_names(shape, isa))
    activations, packed = inputs[:-weights], inputs[-weights:]
    routes = grouping.tensors if grouping else [Tensor("experts", (1, shape.top_k), "int32")]
    tensors = [*activations, *routes, *packed]
    if layer.has_bias:
        tensors.append(Tensor("bias", (shape.experts, layer.n), "float32"))
    tensors.append(Tensor("y", (shape.pairs, layer.n), "float32"))

    def body(block: Expr, *buffers: Buffer) -> None:
        named = dict(zip((t.name for t in tensors), buffers, strict=True))
        store = Store(layer.n, named["y"], named.get("bias"), None)

        def columns(expert: Expr, column_block: Expr, pairs: tuple[Expr, ...]) -> None:
            read = pairs if shape.by_pair else tuple(let(T.floordiv(p, shape.top_k)) for p in pairs)

            def tile(channels: int, panel: Expr, lane: Expr) -> None:
                made = _Tile(
                    isa, len(pairs), channels, 0, panel, lane, expert, layer, read, pairs
                )  # fmt: skip
                emit(made, named, store)

            split_channels(isa, layer.n, width, column_block, tile)

        if grouping is None:
            # The weights of an expert are read from first to last.
            pair = let(T.floordiv(block, column_blocks))
            expert = let(named["experts"][pair])
            columns(expert, let(T.floormod(block, column_blocks)), (pair,))
            return
        # Tiles of one expert are neighbours, and every thread gets a part of every tile's columns.
        index = let(T.floormod(block, grouping.tiles))
        expert = let(named["tile_expert"][index])
        with T.If(expert >= 0), T.Then():
            rows = grouping.rows
            pairs = tuple(let(named["tile_pairs"][index * rows + i]) for i in range(rows))
            columns(expert, let(T.floordiv(block, grouping.tiles)), pairs)

    return define(
        shape.name(isa, knobs), tensors, body,
        grid=column_blocks * (grouping.tiles if grouping else shape.top_k), outputs=["y"],
        work=_work(shape, packed),
    )  # fmt: skip


def _work(shape: RoutedShape, packed: list[Tensor]) -> Work:
    """The weights of the experts that a step can meet at most, and the products of its pairs."""
    met = min(shape.experts, shape.pairs)
    sizes = {t.name: int(np.prod(t.shape)) * np.dtype(t.dtype).itemsize for t in packed}
    if shape.layer.has_bias:
        sizes["bias"] = shape.experts * shape.layer.n * 4
    return Work(
        multiply_adds=shape.pairs * shape.layer.n * shape.layer.k,
        touched={name: size // shape.experts * met for name, size in sizes.items()},
    )
