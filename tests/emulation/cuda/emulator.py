"""Kernels' CUDA text, compiled as C++ and run on this machine, thread by thread."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from slmtvm.codegen.cuda.nodes import Node
from slmtvm.codegen.cuda.nvrtc import compile_ptx
from slmtvm.codegen.cuda.text import PERSISTENT, module_text
from tests.emulation.cuda.ptx import translate_ptx

_HERE = Path(__file__).parent
_FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-fwrapv", "-ffp-contract=off",
    "-fno-strict-aliasing", "-U_FORTIFY_SOURCE",
)  # fmt: skip
_OWN = ("g++", "-mfma", "-mf16c")
_DRIVER_FLAGS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
ORDERS = (0, 1, 12345, 2468)
"""Forward, backward, any order of threads, and some preferred for a while; in the last two several
blocks of a launch are there at once."""


def build(
    nodes: Sequence[Node], folder: Path, persistent: Sequence[Node] = (), triple: str | None = None
) -> Path:
    """A library with ``emu_NAME`` for each entry, for this machine or what ``triple`` names; skips
    the test where there is no g++."""
    return build_text(
        module_text(nodes, persistent),
        [*(n.name for n in nodes), *([PERSISTENT] if persistent else [])],
        folder,
        triple,
    )


def build_ptx(text: str, entries: Sequence[str], folder: Path, arch: str = "sm_87") -> Path:
    """``build`` of what NVIDIA's front end makes of a CUDA text."""
    return build_text(translate_ptx(compile_ptx(text, arch)), entries, folder)


def build_text(text: str, entries: Sequence[str], folder: Path, triple: str | None = None) -> Path:
    """``build`` of a CUDA text and its entries."""
    if triple is None and shutil.which("g++") is None:
        pytest.skip("g++ is not installed: apt-get install g++")
    exports = [
        f'extern "C" const char *emu_{name}(unsigned grid, unsigned size, size_t shared, '
        f"void **params) {{ return emu::launch({name}, grid, size, shared, params, "
        f"{str(name == PERSISTENT).lower()}); }}\n"
        f'extern "C" int emu_sizes_{name}(size_t *to) {{ return emu::sizes({name}, to); }}'
        for name in entries
    ]
    order = 'extern "C" void emu_order(unsigned order) { emu::order = emu::state = order; }'
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text("\n".join(['#include "emulator.h"', text, *exports, order, ""]))
    compiler = _OWN if triple is None else (*_zig(), "c++")
    subprocess.run(
        [*compiler, *_FLAGS, *(["-fno-sanitize=all", "-target", triple] if triple else []),
         f"-I{_HERE}", "-o", str(library), str(source)],
        check=True, timeout=600,  # the first time for a triple zig builds a C++ library, too
    )  # fmt: skip
    return library


def _zig() -> tuple[str, ...]:
    return (sys.executable, "-m", "ziglang")


class Emulated:
    """The kernels of a library that ``build`` made."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def run(
        self,
        node: Node,
        buffers: Sequence[np.ndarray],
        grid: int,
        *,
        position: int = 0,
        valid: int = 0,
        teams: int = 2,
        blocks: int = 2,
        order: int = 0,
    ) -> str | None:
        """Runs ``grid`` blocks of a node on ``blocks`` blocks of ``teams`` teams of threads.

        Returns what the emulator found wrong, None where nothing.
        """
        self._library.emu_order(order)
        ambient = np.array([position, valid], np.int32)
        values: list[ctypes._SimpleCData] = [
            ctypes.c_void_p(b.ctypes.data) for b in (*buffers, ambient)
        ]
        values.append(ctypes.c_int(grid))
        params = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values)
        )
        function = getattr(self._library, f"emu_{node.name}")
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p]
        wrong = function(blocks, teams * 16, node.between_bytes + teams * node.team_bytes, params)
        return wrong.decode() if wrong else None


def build_driver(folder: Path, triple: str | None = None, lacking: str | None = None) -> Path:
    """A libcuda.so.1 that runs the kernels of a library that ``build`` made; an old one may be
    ``lacking`` a function."""
    path = folder / "libcuda.so.1"
    other = [*_zig(), "cc", "-target", str(triple), "-fno-sanitize=all"]
    subprocess.run(
        [*(["gcc"] if triple is None else other), *_DRIVER_FLAGS,
         *([f"-D{lacking}={lacking}_"] if lacking else []), "-o", str(path),
         str(_HERE / "libcuda.c"), "-ldl"],
        check=True, timeout=300,
    )  # fmt: skip
    return path
