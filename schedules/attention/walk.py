"""How kernels walk the lists of ``block_mask``."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.attention.block_mask import WHOLE
from slmtvm.schedules.attention.queries import Query
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.vector import LANES, Buffer, Expr


@dataclass(frozen=True)
class Walk:
    """The list that some queries of a kernel's block share: ``begin .. begin + end`` of it lie no
    further than the last position that they see."""

    shape: AttentionShape
    buffers: dict[str, Buffer]
    list_begin: Expr
    begin: Expr
    end: Expr

    def block(self, index: Expr) -> Expr:
        """The block of positions at ``index``."""
        return T.bind(T.shift_right(self._place(index), T.int32(1)))

    def is_whole(self, index: Expr) -> Expr:
        """Whether all rows of the tile see all of it."""
        return T.bind(T.bitwise_and(self._place(index), T.int32(1)))

    def _place(self, index: Expr) -> Expr:
        return vec.load(self.buffers["block_places"], T.bind(self.list_begin + index), 1)

    def memory(self, index: Expr) -> Expr:
        """Which 16 of the memory for scores are for it."""
        return index

    def stored(self, index: Expr) -> Expr:
        """Which block of the cache it is."""
        return self.block(index)

    def bits(self, query: Query, index: Expr, place: Expr) -> Expr:
        """The keys from ``place`` on that ``query`` sees of the block at ``index``, int32."""
        mask = self.shape.blocks
        assert mask is not None and query.tile_row is not None
        at = (self.list_begin + index) * mask.members
        if mask.members > 1:
            at = at + query.member
        word = vec.load(self.buffers["block_bits"], T.bind(at * mask.rows + query.tile_row), 1)
        word = T.bind(T.cast(word, "int32"))
        if self.shape.causal:
            return word
        left = T.min(query.last - place, T.int32(LANES - 1))
        kept = T.shift_right(T.int32(WHOLE), T.bind(T.int32(LANES - 1) - left))
        return T.bind(T.bitwise_and(word, T.bind(kept)))

    def seen(self, query: Query, index: Expr, place: Expr) -> Expr:
        """Which of the 16 keys from ``place`` on the query sees, of the block at ``index``."""
        word = T.broadcast(self.bits(query, index, place), LANES)
        lanes = T.bind(T.ramp(T.int32(0), 1, LANES))
        own = T.bitwise_and(T.bind(T.shift_right(word, lanes)), vec.splat_int(1))
        return T.bind(own) > vec.splat_int(0)


def walk(shape: AttentionShape, buffers: dict[str, Buffer], head: Expr, last: Query) -> Walk:
    """The list for the queries of a kernel's block, of which ``last`` is the last one."""
    mask = shape.blocks
    assert mask is not None and last.tile is not None
    tile = last.tile if mask.masks == 1 else T.bind(head * mask.tiles + last.tile)
    begin = vec.load(buffers["block_begins"], tile, 1)
    end = vec.load(buffers["block_begins"], tile + 1, 1)
    count = T.alloc_buffer((1,), "int32", scope="local")
    zero = T.int32(0)
    vec.store(count, zero, zero, 1)
    most = T.bind(last.last // LANES)
    with T.serial(begin, end) as entry:
        block = T.shift_right(vec.load(buffers["block_places"], entry, 1), T.int32(1))
        more = T.Select(T.bind(block) <= most, T.int32(1), zero)
        vec.store(count, zero, vec.load(count, zero, 1) + more, 1)
    return Walk(shape, buffers, begin, zero, vec.load(count, zero, 1))
