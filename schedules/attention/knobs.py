"""What can be tuned of attention: how much of the score matrix is computed at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from slmtvm.schedules.attention.attend import build_attend, build_decode
from slmtvm.schedules.attention.shape import AttentionShape
from slmtvm.schedules.attention.tile import default_accumulators, default_queries, tile_queries
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.kernel import Kernel, Tunable
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace

_BUILD: dict[str, Callable[[AttentionShape], Kernel]] = {
    "attend": build_attend,
    "decode": build_decode,
}


def build_tuned(kind: str, shape: AttentionShape, isa: Isa, knobs: Knobs | None = None) -> Kernel:
    """``build_attend`` or ``build_decode``, by ``kind``, with these knobs in the place of the
    shape's own accumulators."""
    settings = knobs or default_knobs(shape, isa)
    kernel = _BUILD[kind](_set(shape, settings))
    return replace(kernel, tunable=Tunable(kind, replace(shape, padded=False), settings))


def knob_space(shape: AttentionShape, isa: Isa) -> KnobSpace:
    """``accumulators`` and ``queries``, see ``AttentionShape``."""
    return {"accumulators": (1, 2, 3, 4, 6, 8, 12, 16), "queries": (1, 2, 3, 4, 6, 8)}


def default_knobs(shape: AttentionShape, isa: Isa) -> Knobs:
    """The setting used where nothing was tuned."""
    return {"accumulators": default_accumulators(isa), "queries": default_queries(isa)}


def effective_knobs(shape: AttentionShape, isa: Isa, knobs: Knobs) -> Knobs:
    """What is really used: as many queries as a tile has, and whole tiles of accumulators."""
    size = tile_queries(_set(shape, knobs))
    return {"accumulators": max(1, knobs["accumulators"] // size) * size, "queries": size}


def _set(shape: AttentionShape, knobs: Knobs) -> AttentionShape:
    return replace(shape, accumulators=knobs["accumulators"], queries=knobs["queries"])
