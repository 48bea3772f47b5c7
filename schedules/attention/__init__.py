"""Attention over a cache: rotate queries and keys, append to the cache, attend."""

from __future__ import annotations

from slmtvm.schedules.attention.append import build_append
from slmtvm.schedules.attention.attend import build_attend, build_decode
from slmtvm.schedules.attention.block_mask import BlockMask, block_tables
from slmtvm.schedules.attention.divided import (
    build_divided_scores,
    build_divided_values,
    parts_of,
)
from slmtvm.schedules.attention.knobs import (
    build_tuned,
    default_knobs,
    effective_knobs,
    knob_space,
)
from slmtvm.schedules.attention.remember import build_remember
from slmtvm.schedules.attention.rotate import Rotation, build_rope
from slmtvm.schedules.attention.shape import (
    BIAS_MARGIN,
    HIDDEN_SCORE,
    AttentionShape,
    capacity_of,
    ring_of,
)
from slmtvm.schedules.attention.tile import suited

__all__ = [
    "BIAS_MARGIN",
    "HIDDEN_SCORE",
    "AttentionShape",
    "BlockMask",
    "Rotation",
    "block_tables",
    "build_append",
    "build_attend",
    "build_decode",
    "build_divided_scores",
    "build_divided_values",
    "build_remember",
    "build_rope",
    "build_tuned",
    "capacity_of",
    "default_knobs",
    "effective_knobs",
    "knob_space",
    "parts_of",
    "ring_of",
    "suited",
]
