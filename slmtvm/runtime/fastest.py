"""Which of a bundle's libraries is the fastest on this machine, as ``slmtvm bench`` found it.

It is kept in a small file of the user's cache: a bundle is signed, and the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from slmtvm.bundle.read import Bundle
from slmtvm.errors import SlmError
from slmtvm.files import read_text
from slmtvm.host import cpu_name

_MAX_BYTES = 64 << 10


@dataclass(frozen=True)
class Fastest:
    """``library`` is the name of a target of the bundle, ``why`` a sentence for people."""

    library: str
    why: str


def file_of(bundle: Bundle) -> Path | None:
    """Where it is kept for this machine and this very bundle; None where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:  # no home folder
        return None
    manifest = bundle.manifest
    libraries = {name: entry.library.sha256 for name, entry in manifest.targets.items()}
    said = [libraries, manifest.weights.sha256, platform.node(), cpu_name()]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return folder / "slmtvm" / "fastest" / f"{digest[:32]}.json"


def write_fastest(bundle: Bundle, fastest: Fastest) -> Path:
    """Keep it, in the place of what was there; raises SlmError where it cannot be written."""
    file = file_of(bundle)
    if file is None:
        raise SlmError(
            "there is no home folder to keep the fastest library's name in; set XDG_CACHE_HOME",
            where=f"{bundle.path}",
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as written:
            json.dump({"bundle": bundle.path.name, **asdict(fastest)}, written, indent=2)
            written.write("\n")
        os.replace(written.name, file)
    except OSError as error:
        raise SlmError(
            f"cannot be written: {error}; set XDG_CACHE_HOME to a folder that can be",
            where=f"{file}",
        ) from error
    return file


def read_fastest(bundle: Bundle) -> Fastest | None:
    """What was kept; None where nothing was, or what is there is none of it."""
    file = file_of(bundle)
    if file is None or not file.is_file():
        return None
    try:
        table = json.loads(read_text(file, _MAX_BYTES))
        found = Fastest(str(table["library"]), str(table["why"]))
    except (SlmError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if found.library in bundle.targets else None
