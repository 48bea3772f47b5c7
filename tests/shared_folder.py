"""What is made once for all tests of a run, by whichever of its processes needs it first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The path that ``make(path)`` wrote, called at most once in a run; ``name`` is unique."""
    return made_in(shared_folder(factory), name, make)


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that its test processes share."""
    # pytest-xdist gives each worker a folder in the run's own. Without it, what is above the run's
    # folder belongs to earlier runs too, of another compiler.
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made-once"
    folder.mkdir(exist_ok=True)
    return folder


def made_in(folder: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The path ``name`` in ``folder``, which ``make(path)`` wrote if nothing had before."""
    path = folder / name
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / f"{name}.done"  # what failed halfway is made again
        if not done.exists():
            make(path)
            done.touch()
    return path
