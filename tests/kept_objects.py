"""Objects of kernels that another test of this run compiled already are taken from there.

Most tests compile the same few models for the same targets, and what LLVM makes of equal kernels
are equal bytes: tests/codegen/test_library.py shows it, which compiles anew each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm_ffi

from slmtvm.codegen import objects
from slmtvm.target import Target
from tests.shared_folder import made_in

compile_anew = objects.object_bytes


def keep_in(folder: Path) -> None:
    """From now on, objects are looked for in ``folder`` before they are compiled."""
    folder.mkdir(exist_ok=True)

    def object_bytes(kernels: Mapping[str, Any], target: Target) -> bytes:
        def make(path: Path) -> None:
            path.write_bytes(compile_anew(kernels, target))

        return made_in(folder, _key(kernels, target), make).read_bytes()

    objects.object_bytes = object_bytes


def _key(kernels: Mapping[str, Any], target: Target) -> str:
    digest = hashlib.sha256(repr((target.name, target.llvm)).encode())
    for name, func in kernels.items():
        digest.update(f"{name} {tvm_ffi.structural_hash(func)} ".encode())
    return digest.hexdigest()[:32]
