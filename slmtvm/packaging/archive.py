"""tar archives whose bytes follow from what they hold: without times and owners."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from slmtvm.packaging.contents import File

_LEVEL = 6  # of gzip: 9 takes several times as long for a hundredth of the bytes


def write_tar(
    output: IO[bytes] | gzip.GzipFile,
    files: Iterable[File],
    extra: Iterable[tuple[str, bytes]] = (),
    *,
    prefix: str = "",
) -> None:
    """``extra`` (path, content) and then ``files``, by their paths, with the folders they lie in.

    Owners are root, times are 0; the format is GNU tar's, which busybox reads as well.
    """  # fmt: skip
    made: set[str] = set()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.GNU_FORMAT) as tar:

        def folders(path: str) -> None:
            for parent in reversed(PurePosixPath(path).parents):
                if str(parent) != "." and str(parent) not in made:
                    made.add(str(parent))
                    entry = _entry(f"{parent}/", 0o755, 0)
                    entry.type = tarfile.DIRTYPE
                    tar.addfile(entry)

        for path, content in extra:
            folders(prefix + path)
            tar.addfile(_entry(prefix + path, 0o644, len(content)), io.BytesIO(content))
        for file in sorted(files, key=lambda f: f.path):
            folders(prefix + file.path)
            with file.source.open("rb") as source:
                tar.addfile(_entry(prefix + file.path, file.mode, file.bytes), source)


@contextmanager
def gzip_file(path: Path) -> Iterator[gzip.GzipFile]:
    """``path``, to be written compressed."""
    with path.open("wb") as raw, gzip_stream(raw) as zipped:
        yield zipped


def gzip_stream(raw: IO[bytes]) -> gzip.GzipFile:
    """Compresses what is written into ``raw``; its header has neither time nor name."""
    return gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=raw, mtime=0)


def _entry(path: str, mode: int, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(path)
    entry.mode, entry.size, entry.mtime = mode, size, 0
    entry.uname = entry.gname = "root"
    return entry
