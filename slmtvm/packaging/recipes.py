"""What the recipes of build systems have in common: the package beside them, and its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slmtvm.packaging.contents import Contents
from slmtvm.packaging.options import Options
from slmtvm.packaging.tarball import write_tarball


@dataclass(frozen=True)
class Packed:
    """The tar.gz that a recipe unpacks: the file's name, the folder in it, hashes, a licence."""

    file: str
    folder: str
    sha256: str
    license: str
    license_md5: str  # of share/licenses.txt, which build systems compare
    license_sha256: str


def pack(several: Sequence[Contents], folder: Path, options: Options) -> Packed:
    """Write the package into ``folder``; what a recipe says of it."""
    (contents,) = several
    name = f"slm-{contents.name}-{contents.version}.tar.gz"
    write_tarball(several, folder / name, options)
    terms = next(f for f in contents.papers if f.path.endswith("licenses.txt")).source.read_bytes()
    return Packed(
        name,
        f"{contents.name}-{contents.version}-{contents.target}",
        hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        contents.license or "CLOSED",
        hashlib.md5(terms).hexdigest(),
        hashlib.sha256(terms).hexdigest(),
    )
