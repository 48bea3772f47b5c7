"""tar.gz: what slm-install puts on a device. Its first file describes the others and is signed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slmtvm.packaging.archive import gzip_file, write_tar
from slmtvm.packaging.contents import Contents
from slmtvm.packaging.options import Options

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


def write_tarball(several: Sequence[Contents], output: Path, options: Options) -> None:
    """The archive: ``NAME-VERSION-TARGET/`` with the description, its signature and all files."""
    (contents,) = several
    description = describe(contents)
    first = [(DESCRIPTION, description)]
    if options.signer is not None:
        first.append((DESCRIPTION_SIGNATURE, options.signer(description)))
    prefix = f"{contents.name}-{contents.version}-{contents.target}/"
    with gzip_file(output) as archive:
        write_tar(archive, contents.files, first, prefix=prefix)
