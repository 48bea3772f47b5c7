"""A file that goes into a package."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class File:
    """A file of a package: its path inside, where its content lies, whether it is a program."""

    path: str
    source: Path
    program: bool = False

    @property
    def mode(self) -> int:
        """Its permissions."""
        return 0o755 if self.program else 0o644

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.source.stat().st_size

    def sha256(self) -> str:
        """Its SHA-256 in hex."""
        digest = hashlib.sha256()
        with self.source.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
        return digest.hexdigest()
