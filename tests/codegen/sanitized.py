"""The project's C sources under gcc's sanitizers, compiled once for all tests of a run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.shared_folder import made_once

CODE = Path(__file__).parents[2] / "slmtvm" / "codegen"
RUNTIME = CODE / "runtime"
DELAY = Path(__file__).parents[1] / "runtime" / "delay.h"


def gcc(sanitizers: str, arguments: Sequence[str], folder: Path) -> None:
    """Run gcc in ``folder``; a warning fails the test, a sanitizer that is missing skips it."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc here; on Debian and Ubuntu: apt install gcc libc6-dev")
    # gcc warns that ThreadSanitizer knows no fences; what the pool's fence orders is no data.
    flags = ["-Wno-tsan"] if sanitizers == "thread" else []
    result = subprocess.run(
        ["gcc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror",
         f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{RUNTIME}", *flags,
         *arguments], cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    if "cannot find" in result.stderr:
        pytest.skip(f"gcc has no {sanitizers} sanitizer here")
    assert result.returncode == 0, result.stderr


def objects(
    factory: pytest.TempPathFactory, sanitizers: str, part: str, pattern: str = "*.c",
    *, delays: bool = False,
) -> list[str]:  # fmt: skip
    """Objects of the sources of ``part`` ("runtime" or "programs") that match ``pattern``.

    With ``delays`` the program that they are linked into says which parts of a step take long, and
    which cores there are.
    """

    def compile_all(folder: Path) -> None:
        sources = sorted((CODE / part).glob(pattern))
        included = []
        if delays:
            sources = [source for source in sources if source.name != "cores.c"]
            included = ["-include", str(DELAY)]
        folder.mkdir(exist_ok=True)
        gcc(sanitizers, ["-c", *included, *map(str, sources)], folder)

    name = f"{part}-{sanitizers}-{pattern.removesuffix('.c')}{'-delays' if delays else ''}"
    folder = made_once(factory, name.replace("*", "all"), compile_all)
    return sorted(os.fspath(path) for path in folder.glob("*.o"))
