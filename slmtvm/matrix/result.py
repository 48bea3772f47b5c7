"""What became of a matrix: a table for people, and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CellResult:
    """One model for one target: ``bundle`` is where it lies, ``error`` why there is none; bytes of
    the library and of the weights; ``seconds`` it took; ``check`` what the manifest says of it."""

    model: str
    target: str
    bundle: str
    seconds: float
    library_bytes: int = 0
    weights_bytes: int = 0
    check: dict[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True)
class MatrixReport:
    """All cells, in the order of the file; ``seconds`` of the whole."""

    cells: tuple[CellResult, ...]
    seconds: float

    @property
    def failed(self) -> int:
        return sum(cell.error is not None for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "failed": self.failed}

    def __str__(self) -> str:
        rows = [["model", "target", "seconds", "library", "weights", "result"]]
        rows += [
            [c.model, c.target, f"{c.seconds:.1f}", _size(c.library_bytes), _size(c.weights_bytes),
             c.bundle if c.error is None else f"failed: {c.error}"]
            for c in self.cells
        ]  # fmt: skip
        done = len(self.cells) - self.failed
        return f"{_table(rows)}\n{done} of {len(self.cells)} compiled in {self.seconds:.1f} s"


def _size(count: int) -> str:
    return f"{count / 1000:,.1f} kB" if count else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 2 <= i <= 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
