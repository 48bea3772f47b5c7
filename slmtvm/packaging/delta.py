"""A delta: a signed package without what a device has already, for slm-install.

It is a tar.gz like the package, with the new package's description and signature first, and then a
file ``delta`` whose lines say how each file comes about:

    base SHA256              of the description of the version that must be installed
    copy OLD PATH            the file OLD of that version
    take PATH                as it is in this archive
    join PATH                of the parts that follow, one after the other
    old OLD SIZE SKIP COUNT  COUNT blocks of SIZE bytes of the file OLD, behind SKIP of them
    new SIZE SKIP COUNT      the same of PATH.parts in this archive

What comes about is compared with the signed description like any package: a delta itself needs no
signature.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slmtvm.errors import SlmError
from slmtvm.packaging.archive import gzip_file, write_tar
from slmtvm.packaging.contents import scratch_folder
from slmtvm.packaging.tarball import DESCRIPTION, DESCRIPTION_SIGNATURE

RECIPE = "delta"
_ALIGNMENT = 64  # bytes: weights' segments begin at multiples of it
_LEAST_MATCH = 8192  # bytes: below, a part costs more than it saves
_MOST_BLOCK = 1 << 20  # bytes that a device copies at once


@dataclass(frozen=True)
class Part:
    """``size`` bytes from ``offset`` of the old content, or of the new one."""

    old: bool
    offset: int
    size: int


def write_delta(old: str | Path, new: str | Path, output: str | Path) -> Path:
    """Write what leads from the tar.gz package ``old`` to ``new`` to ``output``; returns that.

    Raises SlmError where one of them is no package, or they are of different models or targets.
    """
    output = Path(output)
    before, after = _read(Path(old)), _read(Path(new))
    for what in ("name", "target"):
        if _field(before[DESCRIPTION], what) != _field(after[DESCRIPTION], what):
            raise SlmError(f"is not of the same {what} as {old}", where=f"{new}")
    if DESCRIPTION_SIGNATURE not in after:
        raise SlmError("is not signed; package it with --key", where=f"{new}")
    digest = hashlib.sha256(before[DESCRIPTION]).hexdigest()
    lines, included = [f"base {digest}"], []
    known = {hashlib.sha256(content).digest(): path for path, content in before.items()}
    for path, content in sorted(after.items()):
        if path in (DESCRIPTION, DESCRIPTION_SIGNATURE):
            continue
        same = known.get(hashlib.sha256(content).digest())
        parts = find_parts(before[path], content) if path in before and not same else []
        if same is not None:
            lines.append(f"copy {same} {path}")
        elif any(part.old for part in parts):
            told, rest = _tell(path, content, parts)
            lines += told
            included.append((f"{path}.parts", rest))
        else:
            lines.append(f"take {path}")
            included.append((path, content))
    recipe = ("\n".join(lines) + "\n").encode()
    first = [(name, after[name]) for name in (DESCRIPTION, DESCRIPTION_SIGNATURE)]
    prefix = f"{_field(after[DESCRIPTION], 'name')}-{_field(after[DESCRIPTION], 'version')}-delta/"
    try:
        with scratch_folder(output) as folder:
            written = Path(folder) / "written"
            with gzip_file(written) as archive:
                write_tar(archive, (), [*first, (RECIPE, recipe), *included], prefix=prefix)
            written.chmod(0o644)
            os.replace(written, output)
    except OSError as error:
        raise SlmError(f"cannot be written: {error.strerror}", where=f"{output}") from error
    return output


def find_parts(old: bytes, new: bytes) -> list[Part]:
    """``new`` as pieces of ``old``, found at multiples of 64 bytes, and of itself."""
    parts: list[Part] = []
    chunks = len(old) // _ALIGNMENT
    index = {old[i * _ALIGNMENT : (i + 1) * _ALIGNMENT]: i for i in reversed(range(chunks))}
    left, right = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
    at = start = 0
    while at + _ALIGNMENT <= len(new):
        found = index.get(new[at : at + _ALIGNMENT])
        # What lies at the same place comes first: zeros and the like are everywhere.
        candidates = {at, found * _ALIGNMENT} if found is not None else {at}
        size, offset = max((_equal(left[c:], right[at:]), -c) for c in candidates)
        size -= size % _ALIGNMENT
        if size < _LEAST_MATCH:
            at += _ALIGNMENT
            continue
        if at > start:
            parts.append(Part(False, start, at - start))
        parts.append(Part(True, -offset, size))
        at += size
        start = at
    if start < len(new):
        parts.append(Part(False, start, len(new) - start))
    return parts


def _equal(left: np.ndarray, right: np.ndarray) -> int:
    """How many of the first bytes are equal."""
    count = min(len(left), len(right))
    size = _LEAST_MATCH
    at = 0
    while at < count:  # most differ soon
        end = min(at + size, count)
        differing = np.flatnonzero(left[at:end] != right[at:end])
        if differing.size:
            return at + int(differing[0])
        at, size = end, size * 4
    return count


def _tell(path: str, content: bytes, parts: list[Part]) -> tuple[list[str], bytes]:
    """The recipe's lines for a file made of ``parts``, and what of it the archive must hold."""
    lines, rest = [f"join {path}"], io.BytesIO()
    for part in parts:
        offset = part.offset if part.old else rest.tell()
        source = f"old {path}" if part.old else "new"
        lines += [f"{source} {b} {s} {c}" for b, s, c in _blocks(offset, part.size)]
        if not part.old:
            rest.write(content[part.offset : part.offset + part.size])
            rest.write(bytes(-rest.tell() % _ALIGNMENT))  # so that the next begins at a block
    return lines, rest.getvalue()


def _blocks(offset: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(block, skip, count) of dd that copy ``size`` bytes from ``offset``, a multiple of 64."""
    while size:
        block = _MOST_BLOCK
        while offset % block or block > size:
            block //= 2
        # As many of these as there are before larger ones fit.
        count = size // block
        if block < _MOST_BLOCK and offset % (block * 2) and size >= block * 4:
            count = 1
        yield block, offset // block, count
        offset, size = offset + block * count, size - block * count


def _read(path: Path) -> dict[str, bytes]:
    """A package's files by their paths inside."""
    try:
        with tarfile.open(path, "r:gz") as tar:
            found = {
                member.name.partition("/")[2]: file.read()
                for member in tar
                if member.isfile() and (file := tar.extractfile(member))
            }
    except FileNotFoundError as error:
        raise SlmError("no such file", where=f"{path}") from error
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise SlmError(f"cannot be read as a package: {error}", where=f"{path}") from error
    if not found.get(DESCRIPTION, b"").startswith(b"slm-package 1\n"):
        raise SlmError("is no package of `slmtvm package --format tar.gz`", where=f"{path}")
    return found


def _field(description: bytes, name: str) -> str:
    lines = description.decode(errors="replace").splitlines()
    return next((line.partition(" ")[2] for line in lines if line.startswith(f"{name} ")), "")
