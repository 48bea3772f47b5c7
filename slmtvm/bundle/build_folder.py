"""The folder beside a bundle's place in which it is built, and those that dead processes left."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LONGEST_PREFIX = 200  # bytes; a name has 255 in most file systems
_ASIDE = ".old"


@contextmanager
def build_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``, removed at the end whatever lies under its name then.

    Its maker holds a lock on it: a folder without one is what a process left that was killed, and
    is removed by the next that builds the same ``path``. Raises OSError where there is no place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    folder, lock = _locked_folder(path)
    try:
        yield folder
    finally:
        # After the move into place this is gone, or is the older bundle that was replaced.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def aside(folder: Path) -> Path:
    """Where the older bundle waits while ``folder`` takes its place."""
    return folder.with_name(folder.name + _ASIDE)


def _prefix(path: Path) -> str:
    name = os.fsencode(path.name)[:_LONGEST_PREFIX]
    return f".{os.fsdecode(name)}."


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A new folder and the descriptor whose lock on it says that its maker lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
        lock = os.open(folder, os.O_RDONLY)
        if not _lock(lock) or os.fstat(lock).st_nlink > 0:
            return folder, lock
        os.close(lock)  # swept before it was locked


def _lock(descriptor: int, *, wait: bool = True) -> bool:
    """Take the lock; False where another holds it, or the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _sweep(path: Path) -> None:
    """Remove the folders that were being built for ``path`` by processes that are gone."""
    random_length = 8  # of the names that tempfile makes
    prefix = _prefix(path)
    for left in path.parent.glob(f"{_escaped(prefix)}*"):
        random = left.name.removeprefix(prefix).removesuffix(_ASIDE)
        if len(random) != random_length or left.is_symlink() or not left.is_dir():
            continue
        if left.name.endswith(_ASIDE) and not path.exists():
            continue  # the only bundle there is
        try:
            lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            continue  # gone meanwhile, or somebody else's
        try:
            if _lock(lock, wait=False):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(lock)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
