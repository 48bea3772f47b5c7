"""C sources as one object for each link triple: compiled once, kept, linked every time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from slmtvm.codegen.zig import cache_folder, zig_cc

C_FLAGS = (
    "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden",
    "-fno-asynchronous-unwind-tables",  # a tenth of a program: nothing here unwinds
    # Their guard is a symbol of the dynamic loader on some architectures, outside libc.
    "-fno-stack-protector",
    "-ffunction-sections", "-fdata-sections",
)  # fmt: skip


def runtime_object(
    link_triple: str,
    sources: Path,
    folder: Path,
    *,
    headers: Sequence[Path] = (),
    flags: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Path:
    """``kept_object`` of all C files of ``sources``, which has their headers, too."""
    files = sorted(sources.glob("*.c"))
    return kept_object(
        link_triple, sources.name, files, folder,
        headers=[sources, *headers], flags=flags, progress=progress,
    )  # fmt: skip


def kept_object(
    link_triple: str,
    name: str,
    files: Sequence[Path],
    folder: Path,
    *,
    headers: Sequence[Path],
    flags: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Path:
    """The object ``name`` of C ``files`` for ``link_triple``: in the cache, or made in ``folder``.

    ``headers``: folders whose headers they include. ``flags``: more of the compiler's. Equal
    sources give equal bytes, kept or compiled anew. Raises SlmError where that fails.
    """
    kept = cache_folder().parent / f"{name}-{_key(link_triple, files, headers, flags)}.o"
    if kept.is_file():
        return kept
    if progress:
        progress(f"compiling the C {name} for {link_triple}: once for this version")
    made = folder / f"{name}.o"
    zig_cc(
        link_triple,
        [*C_FLAGS, *flags, *(f"-I{path}" for path in headers), "-c", *map(str, files), "-o",
         made.name],
        folder=folder,
        progress=progress,
    )  # fmt: skip
    _keep(made, kept)
    return made


def _key(
    link_triple: str, files: Sequence[Path], headers: Sequence[Path], flags: Sequence[str]
) -> str:
    """Of all that the object depends on: the files, the flags, the compiler."""
    digest = hashlib.sha256(repr((link_triple, C_FLAGS, *flags, version("ziglang"))).encode())
    for path in (*files, *(header for folder in headers for header in sorted(folder.glob("*.h")))):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:32]


def _keep(made: Path, kept: Path) -> None:
    """Copy ``made`` to ``kept`` in one step; without room there it is compiled anew next time."""
    copy = kept.with_name(f"{kept.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        try:
            shutil.copyfile(made, copy)
            with copy.open("rb") as file:
                os.fsync(file.fileno())  # a name must not come before the content
            copy.replace(kept)
        finally:
            copy.unlink(missing_ok=True)
