"""Pairs of tokens and experts sorted by expert, for linear layers to take several rows at once."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.vector import Buffer, Expr


@dataclass(frozen=True)
class Grouping:
    """The pairs of m tokens in tiles of ``rows`` pairs of one expert.

    ``tile_expert`` is the expert of each tile, -1 where there are no more; ``tile_pairs`` its
    pairs, the last one repeated where the expert has no more.
    """

    m: int
    top_k: int
    experts: int
    rows: int

    @property
    def pairs(self) -> int:
        return self.m * self.top_k

    @property
    def tiles(self) -> int:
        """The most that there can be: every expert that has pairs has one tile that is not full."""
        used = min(self.experts, self.pairs)
        return used + (self.pairs - used) // self.rows

    @property
    def tensors(self) -> list[Tensor]:
        """``tile_expert`` and ``tile_pairs``."""
        return [
            Tensor("tile_expert", (self.tiles,), "int32"),
            Tensor("tile_pairs", (self.tiles, self.rows), "int32"),
        ]


def build_group(op: Grouping) -> Kernel:
    """experts int32 (m, top_k) -> the tensors of ``op``; one block.

    Only the pairs of the step's ``valid`` first tokens are in a tile.
    """
    tensors = [Tensor("experts", (op.m, op.top_k), "int32"), *op.tensors]

    def body(
        _block: Expr, experts: Buffer, tile_expert: Buffer, tile_pairs: Buffer, valid: Expr
    ) -> None:
        # Where the next pair of each expert goes: first counted, then summed up.
        place = T.alloc_buffer((op.experts,), "int32", scope="local")
        tile = T.alloc_buffer((1,), "int32", scope="local")
        pairs = T.bind(valid * op.top_k)
        with T.serial(0, op.experts) as expert:
            T.buffer_store(place, T.int32(0), [expert])
        with T.serial(0, pairs) as pair:
            expert = T.bind(experts[pair])
            T.buffer_store(place, place[expert] + 1, [expert])
        T.buffer_store(tile, T.int32(0), [0])
        with T.serial(0, op.experts) as expert:
            first = T.bind(tile[0])
            used = T.bind(T.floordiv(place[expert] + (op.rows - 1), op.rows))
            with T.serial(0, used) as extra:
                T.buffer_store(tile_expert, expert, [first + extra])
            T.buffer_store(tile, first + used, [0])
            T.buffer_store(place, first * op.rows, [expert])
        with T.serial(tile[0], op.tiles) as unused:
            T.buffer_store(tile_expert, T.int32(-1), [unused])
        with T.serial(0, pairs) as pair:
            expert = T.bind(experts[pair])
            at = T.bind(place[expert])
            # The rest of the tile, for this to be the last pair of its expert.
            with T.serial(at, T.bind(T.floordiv(at, op.rows) + 1) * op.rows) as slot:
                T.buffer_store(tile_pairs, pair, [slot])
            T.buffer_store(place, at + 1, [expert])

    return define(
        f"group_m{op.m}_k{op.top_k}_e{op.experts}_r{op.rows}", tensors, body, grid=1,
        outputs=["tile_expert", "tile_pairs"], scalars=["valid"],
    )  # fmt: skip
