"""How the roundings of a mixture of experts are written at its ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from slmtvm.schedules.experts.points import POINTS, ROUTING_POINTS, Levels

_SUFFIX = "_rounding"
_T = TypeVar("_T")


def as_operands(roundings: Mapping[str, _T]) -> dict[str, _T]:
    """What a value for each point is called among an op's operands, in the order of POINTS."""
    return {f"{point}{_SUFFIX}": roundings[point] for point in POINTS if point in roundings}


def among(operands: Mapping[str, _T], points: tuple[str, ...] = POINTS) -> dict[str, _T]:
    """The values of ``points`` among an op's operands, by point."""
    return {p: operands[f"{p}{_SUFFIX}"] for p in points if f"{p}{_SUFFIX}" in operands}


def as_text(levels: Mapping[str, Levels]) -> str:
    """Roundings of the routing as an attribute: "point:scale:low:high", joined by ";"."""
    return ";".join(
        f"{point}:{levels[point][0]!r}:{levels[point][1]}:{levels[point][2]}"
        for point in ROUTING_POINTS
        if point in levels
    )


def parse(text: str) -> dict[str, Levels]:
    """The inverse of ``as_text``."""
    parts = [part.split(":") for part in text.split(";") if part]
    return {point: (float(scale), int(low), int(high)) for point, scale, low, high in parts}
