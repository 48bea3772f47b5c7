"""The C compiler and linker for every target: ziglang, which comes as a Python package."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import ziglang

from slmtvm.errors import SlmError

# Called itself: to start Python for it takes as long as to link a small library.
_ZIG = Path(ziglang.__file__).parent / "zig"


def cache_folder() -> Path:
    """Where zig keeps the libc stubs that it builds once for each target."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "slmtvm" / "zig"


def zig_cc(
    link_triple: str, arguments: list[str], *, progress: Callable[[str], None] | None = None
) -> None:
    """Run ``zig cc -target link_triple arguments``; SlmError with zig's words if it fails.

    ``progress`` is told when this is the first time for ``link_triple``, which takes much longer.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    done_before = folder / f"linked-{link_triple}"
    if progress and not done_before.exists():
        progress(f"building the libc stubs for {link_triple}: once, up to 3 minutes")
    environment = {
        **os.environ,
        "ZIG_GLOBAL_CACHE_DIR": str(folder),
        "ZIG_LOCAL_CACHE_DIR": str(folder),
    }
    # -fno-sanitize: zig turns the undefined-behaviour sanitizer on by default, which would put its
    # runtime into the library.
    command = [str(_ZIG), "cc", "-target", link_triple, "-fno-sanitize=all"]
    result = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise SlmError(f"zig cc failed for {link_triple}:\n{result.stderr.strip()}")
    done_before.touch()
