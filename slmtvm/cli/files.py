"""Files that verbs write beside what they print."""

from __future__ import annotations

from pathlib import Path

from slmtvm.errors import SlmError


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``; SlmError where that is not possible."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SlmError(f"cannot be written: {error.strerror}", where=str(path)) from error
