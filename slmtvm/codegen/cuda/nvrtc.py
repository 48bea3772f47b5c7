"""CUDA text to machine code by NVIDIA's NVRTC, which needs no GPU, driver or CUDA installation."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

from slmtvm.errors import SlmError, TargetError

_OPTIONS = (
    "--std=c++17", "--disable-warnings",
    # The bits of a CPU: nothing contracted, subnormal numbers kept, division and roots exact.
    "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true",
)  # fmt: skip
RELEASES = {
    11: ("cuda_nvrtc/lib/libnvrtc.so.11*", "cuda11"),
    12: ("cuda_nvrtc/lib/libnvrtc.so.12*", "cuda"),
    13: ("cu13/lib/libnvrtc.so.13*", "cuda13"),
}
"""By major release of CUDA: where its package has the library, and the extra that brings it."""


def is_installed(release: int) -> bool:
    """Whether there is an NVRTC of this major release of CUDA."""
    return _path(release) is not None


def compile_cubin(text: str, arch: str, release: int = 12) -> bytes:
    """The machine code of ``text`` for ``arch`` ("sm_87"), by the NVRTC of a ``release`` of CUDA.

    Raises TargetError where it is not installed or does not know the architecture, SlmError where
    the text does not compile.
    """
    return compile_both(text, arch, release)[0]


def compile_ptx(text: str, arch: str, release: int = 12) -> str:
    """What NVIDIA's front end makes of ``text`` before its assembler does ``compile_cubin``'s."""
    return _compile(text, arch, release, arch.replace("sm_", "compute_"))[1]


def compile_both(text: str, arch: str, release: int = 12) -> tuple[bytes, str]:
    """``compile_cubin``'s and ``compile_ptx``'s result."""
    return _compile(text, arch, release, arch)


def _compile(text: str, arch: str, release: int, made_for: str) -> tuple[bytes, str]:
    """Machine code, none where what it is ``made_for`` is no architecture of machines, and PTX."""
    nvrtc = _library(release)
    known = _architectures(release)
    if arch not in known:
        raise TargetError(
            f"cuda.arch is {arch!r}; NVRTC {release} compiles for {', '.join(known)}",
            where="cuda",
        )
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
    try:
        options = [o.encode() for o in (f"--gpu-architecture={made_for}", *_OPTIONS)]
        given = (ctypes.c_char_p * len(options))(*options)
        with _own_locale():
            failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
        if failed:
            log = _get(nvrtc, program, "ProgramLog").rstrip(b"\0").decode()
            raise SlmError(f"NVRTC does not compile the kernels:\n{log}", where=arch)
        ptx = _get(nvrtc, program, "PTX").rstrip(b"\0").decode()
        return _get(nvrtc, program, "CUBIN") if made_for == arch else b"", ptx
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@contextmanager
def _own_locale() -> Iterator[None]:
    """NVRTC 11 leaves the calling thread in the C locale, whose texts are ASCII."""
    libc = ctypes.CDLL(None)
    libc.uselocale.restype = ctypes.c_void_p
    libc.uselocale.argtypes = [ctypes.c_void_p]
    before = libc.uselocale(None)
    try:
        yield
    finally:
        libc.uselocale(before)


def _get(nvrtc: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    data = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, data)
    return data.raw


def _path(release: int) -> Path | None:
    # The package has no code: it is a namespace of libraries.
    package = util.find_spec("nvidia")
    folders = package.submodule_search_locations if package else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob(RELEASES[release][0])):
            if ".alt." not in path.name:
                return path
    return None


@cache
def _library(release: int) -> Any:
    path = _path(release)
    if path is None:
        raise TargetError(
            f"its kernels are compiled by NVRTC {release}: pip install "
            f"'slmtvm[{RELEASES[release][1]}]'",
            where="cuda",
        )
    # It looks for these by name; of 13 on, not beside itself.
    for part in sorted(path.parent.glob(f"libnvrtc-builtins.so.{release}.*")):
        ctypes.CDLL(str(part))
    return ctypes.CDLL(str(path))


@cache
def _architectures(release: int) -> list[str]:
    nvrtc, count = _library(release), ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(found)
    return [f"sm_{number}" for number in found]
