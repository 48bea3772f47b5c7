"""Which operators are written out in primitive ones, and by which function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slmtvm.importer.expand.site import Site

Write = Callable[["Site"], Sequence[str]]
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Expansion:
    """One composite operator from version ``since`` on.

    ``write(site)`` writes nodes and returns the value of each output, "" for one that is not
    supported. ``arity`` (fewest and most inputs) and ``attributes`` (name -> type and whether it
    must be there) are for operators that onnx has no schema of.
    """

    domain: str
    op_type: str
    since: int
    write: Write
    arity: tuple[int, int] = (1, 1)
    attributes: Mapping[str, tuple[int, bool]] = field(default_factory=dict)


_EXPANSIONS: dict[tuple[str, str], list[Expansion]] = {}


def expansion(
    op_type: str,
    since: int,
    domain: str = "",
    *,
    arity: tuple[int, int] = (1, 1),
    attributes: Mapping[str, tuple[int, bool]] | None = None,
) -> Callable[[Write], Write]:
    """Decorator: the function below writes out ``op_type`` of ``domain`` from ``since`` on."""

    def add(write: Write) -> Write:
        entries = _EXPANSIONS.setdefault((domain, op_type), [])
        entries.append(Expansion(domain, op_type, since, write, arity, attributes or {}))
        entries.sort(key=lambda e: e.since)
        return write

    return add


def find_expansion(domain: str, op_type: str, version: int) -> Expansion | None:
    """The newest expansion not newer than ``version``, or None."""
    entries = [e for e in _EXPANSIONS.get((domain, op_type), ()) if e.since <= version]
    return entries[-1] if entries else None


def registered_expansions() -> list[Expansion]:
    """Every entry, ordered by domain, name and version."""
    return [entry for key in sorted(_EXPANSIONS) for entry in _EXPANSIONS[key]]
