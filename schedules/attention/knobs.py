"""What can be tuned of attention: how many accumulators its tiles are made for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from slmtvm.schedules.attention.attend import build_attend, build_decode
from slmtvm.schedules.attention.shape import AttentionShape, default_accumulators
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
    kernel = _BUILD[kind](replace(shape, accumulators=settings["accumulators"]))
    return replace(kernel, tunable=Tunable(kind, replace(shape, padded=False), settings))


def knob_space(shape: AttentionShape, isa: Isa) -> KnobSpace:
    """``accumulators``, see ``AttentionShape``."""
    return {"accumulators": (1, 2, 3, 4, 6, 8, 12, 16)}


def default_knobs(shape: AttentionShape, isa: Isa) -> Knobs:
    """The setting used where nothing was tuned."""
    return {"accumulators": default_accumulators(isa.name)}


def effective_knobs(shape: AttentionShape, isa: Isa, knobs: Knobs) -> Knobs:
    """``knobs``: each setting has code of its own."""
    return knobs
