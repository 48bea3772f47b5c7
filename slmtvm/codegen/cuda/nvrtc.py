"""CUDA text to machine code by NVIDIA's NVRTC, which needs no GPU, driver or CUDA installation."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import util
from pathlib import Path

from slmtvm.errors import SlmError, TargetError

_OPTIONS = (
    "--std=c++17",
    # The bits of a CPU: nothing contracted, subnormal numbers kept, division and roots exact.
    "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true",
)  # fmt: skip
_EXTRA = "pip install 'slmtvm[cuda]'"


def compile_cubin(text: str, arch: str) -> bytes:
    """The machine code of ``text`` for ``arch`` ("sm_87").

    Raises TargetError where NVRTC is not installed or does not know the architecture, SlmError
    where the text does not compile.
    """
    nvrtc = _library()
    known = _architectures()
    if arch not in known:
        raise TargetError(
            f"cuda.arch is {arch!r}; the installed NVRTC compiles for {', '.join(known)}",
            where="cuda",
        )
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
    try:
        options = [o.encode() for o in (f"--gpu-architecture={arch}", *_OPTIONS)]
        given = (ctypes.c_char_p * len(options))(*options)
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            log = _get(program, "ProgramLog").rstrip(b"\0").decode()
            raise SlmError(f"NVRTC does not compile the kernels:\n{log}", where=arch)
        return _get(program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _get(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    data = ctypes.create_string_buffer(size.value)
    getattr(_library(), f"nvrtcGet{what}")(program, data)
    return data.raw


@cache
def _library() -> ctypes.CDLL:
    # The package has no code: it is a namespace of libraries.
    package = util.find_spec("nvidia")
    folders = package.submodule_search_locations if package else None
    for folder in folders or ():
        # That of the extra: torch brings another one, whose parts torch's loader alone finds.
        for path in sorted(Path(folder).glob("cuda_nvrtc/lib/libnvrtc.so.*")):
            if ".alt." not in path.name:
                return ctypes.CDLL(str(path))
    raise TargetError(f"kernels for GPUs are compiled by NVRTC: {_EXTRA}", where="cuda")


@cache
def _architectures() -> list[str]:
    count = ctypes.c_int()
    _library().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    _library().nvrtcGetSupportedArchs(found)
    return [f"sm_{number}" for number in found]
