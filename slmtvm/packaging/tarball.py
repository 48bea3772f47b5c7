"""tar.gz: what slm-install puts on a device. Its first file describes the others and is signed."""

from __future__ import annotations

from pathlib import Path

from slmtvm.bundle.signature import Signer
from slmtvm.packaging.archive import gzip_file, write_tar
from slmtvm.packaging.contents import Contents

DESCRIPTION = "package"
DESCRIPTION_SIGNATURE = "package.sig"


def describe(contents: Contents) -> bytes:
    """The description: lines that a shell reads. ``file MODE SHA256 BYTES PATH`` names a file."""
    lines = [
        "slm-package 1",
        f"name {contents.name}",
        f"version {contents.version}",
        f"counter {contents.counter}",
        f"target {contents.target}",
        f"arch {contents.entry.arch}",
        f"requires {' '.join(contents.entry.requires)}".rstrip(),
        f"bytes {contents.bytes}",
    ]
    for file in contents.files:
        lines.append(f"file {file.mode:04o} {file.sha256()} {file.bytes} {file.path}")
    return ("\n".join(lines) + "\n").encode()


def write_tarball(contents: Contents, output: Path, signer: Signer | None) -> None:
    """The archive: ``NAME-VERSION-TARGET/`` with the description, its signature and all files."""
    description = describe(contents)
    first = [(DESCRIPTION, description)]
    if signer is not None:
        first.append((DESCRIPTION_SIGNATURE, signer(description)))
    prefix = f"{contents.name}-{contents.version}-{contents.target}/"
    with gzip_file(output) as archive:
        write_tar(archive, contents.files, first, prefix=prefix)
