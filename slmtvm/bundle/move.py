"""A finished folder takes its place, whatever was there before, in one step where that can be."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

from slmtvm.bundle.build_folder import aside

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def move_into_place(folder: Path, path: Path) -> None:
    """Give ``folder`` the name ``path``; what was there takes the folder's, or is removed."""
    if not path.exists():
        folder.rename(path)
    elif not _exchange(folder, path):
        # No exchange on this file system: for a moment there is no bundle at ``path``.
        older = aside(folder)
        path.rename(older)
        try:
            folder.rename(path)
        except BaseException:
            older.rename(path)
            raise
        shutil.rmtree(older, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    code: int = renameat2(
        _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE
    )
    return code == 0
