"""Instruction sets: one file each, found by name."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path

from slmtvm.errors import TargetError
from slmtvm.schedules.isa._picking import (
    PAIR_CHOICES,
    PAIRS,
    WINDOWS,
    PairPicking,
    Picking,
    Window,
)
from slmtvm.schedules.isa.base import Dot, Isa

__all__ = [
    "PAIRS",
    "PAIR_CHOICES",
    "WINDOWS",
    "Dot",
    "Isa",
    "PairPicking",
    "Picking",
    "Window",
    "get",
    "known",
]


def known() -> list[str]:
    """Names of the instruction sets: the files of this folder, but for what several share."""
    return sorted(
        path.stem
        for path in Path(__file__).parent.glob("*.py")
        if path.stem != "base" and not path.stem.startswith("_")
    )


@cache
def get(name: str) -> Isa:
    """The instruction set called ``name``: the ``ISA`` of the file of that name.

    Raises TargetError where there is none.
    """
    if name not in known():
        raise TargetError(f"unknown isa {name!r}; known are {', '.join(known())}", where=name)
    isa: Isa = import_module(f"{__name__}.{name}").ISA
    assert isa.name == name
    return isa
