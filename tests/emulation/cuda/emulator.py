"""Kernels' CUDA text, compiled as C++ and run on this machine, thread by thread."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from slmtvm.codegen.cuda.text import DEVICE_TEXT
from slmtvm.codegen.cuda.translate import CudaKernel

_HERE = Path(__file__).parent
_FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-fwrapv", "-ffp-contract=off",
    "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-mfma", "-mf16c",
)  # fmt: skip
ORDERS = (0, 1, 12345)
"""Forward, backward, and any order of threads."""


def build(kernels: Sequence[CudaKernel], folder: Path) -> Path:
    """A library with ``emu_NAME`` for each kernel; skips the test where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: apt-get install g++")
    exports = [
        f'extern "C" const char *emu_{k.name}(unsigned grid, unsigned size, size_t shared, '
        f"void **params) {{ return emu::launch({k.name}, grid, size, shared, params); }}\n"
        f'extern "C" const int emu_params_{k.name} = {k.pointers + 2};'
        for k in kernels
    ]
    order = 'extern "C" void emu_order(unsigned order) { emu::order = order; }'
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    texts = [k.text for k in kernels]
    source.write_text(
        "\n".join(['#include "emulator.h"', DEVICE_TEXT, *texts, *exports, order, ""])
    )
    subprocess.run(
        ["g++", *_FLAGS, f"-I{_HERE}", "-o", str(library), str(source)], check=True, timeout=300
    )
    return library


class Emulated:
    """The kernels of a library that ``build`` made."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def run(
        self,
        kernel: CudaKernel,
        buffers: Sequence[np.ndarray],
        grid: int,
        *,
        position: int = 0,
        valid: int = 0,
        teams: int = 2,
        blocks: int = 2,
        order: int = 0,
    ) -> str | None:
        """Runs ``grid`` blocks of a kernel on ``blocks`` blocks of ``teams`` teams of threads.

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
        function = getattr(self._library, f"emu_{kernel.name}")
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p]
        wrong = function(blocks, teams * 16, teams * kernel.team_bytes, params)
        return wrong.decode() if wrong else None


def build_driver(folder: Path) -> Path:
    """A libcuda.so.1 that runs the kernels of a library that ``build`` made."""
    path = folder / "libcuda.so.1"
    subprocess.run(
        ["gcc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-o",
         str(path), str(_HERE / "libcuda.c"), "-ldl"],
        check=True, timeout=300,
    )  # fmt: skip
    return path
