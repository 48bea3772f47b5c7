"""Kernels that several models of the corpus have are compiled once in a run.

Models of one family differ by their exporter, head and quantization: most kernels of a file are
those of another one, and to compile them takes most of the time of a check. Here each becomes an
object of its own, and the object of a model is linked from them; the compiler itself makes one of
all kernels of a model, as the tests do.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm_ffi
import ziglang

from slmtvm.codegen import objects
from slmtvm.target import Target

_ZIG = Path(ziglang.__file__).parent / "zig"
_compile = objects.object_bytes


def keep_kernels(folder: Path) -> None:
    """From now on, objects are put together from those of kernels, which are kept in ``folder``."""
    folder.mkdir(exist_ok=True)

    def object_bytes(kernels: Mapping[str, Any], target: Target) -> bytes:
        parts = [_kept(folder, name, kernel, target) for name, kernel in kernels.items()]
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            whole = Path(scratch) / "kernels.o"
            command = [_ZIG, "ld.lld", "-r", "-o", whole, *parts]
            subprocess.run(command, check=True)
            return whole.read_bytes()

    objects.object_bytes = object_bytes


def _kept(folder: Path, name: str, kernel: Any, target: Target) -> Path:
    """The object of one kernel, which appears whole: other processes may look for it."""
    words = f"{name} {target.name} {target.llvm} {tvm_ffi.structural_hash(kernel)}"
    path = folder / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.o"
    if not path.exists():
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_bytes(_compile({name: kernel}, target))
        scratch.rename(path)
    return path
