"""How attention's kernels are cut to suit an ISA."""

from __future__ import annotations

import math
from dataclasses import replace

from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.isa import Isa

# 16-lane accumulators that fit the registers beside the operands: AVX-512 has 32 registers of one
# such vector, the others hold eight in all.
_ACCUMULATORS = {"avx512_vnni": 16}
_ACCUMULATORS_OTHERS = 4
# With six queries, two registers each, AVX2 has two left for a key and one for a factor. The others
# have registers enough for more blocks of keys instead, or are as busy with four.
_QUERIES = {"avx512_vnni": 8, "avx2": 6}
_QUERIES_OTHERS = 4
ENOUGH_QUERIES = 4  # keep the multipliers busy
# Floats of queries, more of which leave the near caches before they are read: with as many outputs
# they fill the second level of a usual core.
_NEAR_QUERIES = 1 << 16


def default_accumulators(isa: Isa) -> int:
    """A good ``AttentionShape.accumulators``."""
    return _ACCUMULATORS.get(isa.name, _ACCUMULATORS_OTHERS)


def default_queries(isa: Isa) -> int:
    """A good ``AttentionShape.queries``."""
    return _QUERIES.get(isa.name, _QUERIES_OTHERS)


def suited(shape: AttentionShape, isa: Isa) -> AttentionShape:
    """``shape`` as it is computed on ``isa`` unless something else was tuned; the results are the
    same in every bit."""
    return replace(
        shape, native_f16=isa.native_f16, accumulators=default_accumulators(isa),
        queries=default_queries(isa), apart=isa.sets_apart, ahead=isa.prefetch and shape.cached,
        rows_ahead=isa.prefetch and math.prod(shape.q.shape) > _NEAR_QUERIES,
    )  # fmt: skip


def tile_queries(shape: AttentionShape) -> int:
    """Queries whose scores are computed together: those of a block, in as few equal parts as can
    be."""
    queries = rows_in_block(shape) * shape.group
    return -(-queries // -(-queries // shape.queries))


def rows_in_block(shape: AttentionShape) -> int:
    """Rows (tokens) of a block: what takes least time, where a block of few queries takes as long
    as one of ``ENOUGH_QUERIES``; the larger of equals."""
    most = min(shape.m, max(1, shape.queries // shape.group))
    if shape.blocks is not None and not shape.causal:
        return 1 << (most.bit_length() - 1)  # blocks of rows end where tiles do

    def cost(count: int) -> int:
        return -(-shape.m // count) * max(count * shape.group, ENOUGH_QUERIES)

    return min(range(most, 0, -1), key=cost)
