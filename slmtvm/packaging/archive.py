"""tar archives whose bytes follow from what they hold: without times and owners."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from slmtvm.packaging.file import File

_LEVEL = 6  # of gzip: 9 takes several times as long for a hundredth of the bytes


class _Sink(Protocol):
    def write(self, data: bytes, /) -> int: ...


def write_tar(
    output: _Sink | IO[bytes],
    files: Iterable[File],
    extra: Iterable[tuple[str, bytes]] = (),
    *,
    prefix: str = "",
    time: int = 0,
) -> None:
    """``extra`` (path, content) and then ``files``, by their paths, with the folders they lie in.

    ``prefix``, which ends with a slash where there is one, comes before every path. Owners are
    root, ``time`` is in seconds; the format is GNU tar's, which busybox reads as well.
    """
    made: set[str] = set()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]

        def folder(path: str) -> None:
            if path not in made:
                made.add(path)
                entry = _entry(path, 0o755, 0, time)
                entry.type = tarfile.DIRTYPE
                tar.addfile(entry)

        def folders(path: str) -> None:
            if prefix:
                folder(prefix)
            for parent in reversed(PurePosixPath(path).parents):
                if str(parent) != ".":
                    folder(f"{prefix}{parent}/")

        for path, content in extra:
            folders(path)
            tar.addfile(_entry(prefix + path, 0o644, len(content), time), io.BytesIO(content))
        for file in sorted(files, key=lambda f: f.path):
            folders(file.path)
            with file.source.open("rb") as source:
                tar.addfile(_entry(prefix + file.path, file.mode, file.bytes, time), source)


@contextmanager
def gzip_file(path: Path) -> Iterator[gzip.GzipFile]:
    """``path``, to be written compressed."""
    with path.open("wb") as raw, gzip_stream(raw) as zipped:
        yield zipped


def gzip_stream(raw: IO[bytes]) -> gzip.GzipFile:
    """Compresses what is written into ``raw``; its header has neither time nor name."""
    return gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=raw, mtime=0)


def _entry(path: str, mode: int, size: int, time: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(path)
    entry.mode, entry.size, entry.mtime = mode, size, time
    entry.uname = entry.gname = "root"
    return entry
