"""The C functions for text alone, without a model: built once for each test process."""

from __future__ import annotations

import ctypes
import tempfile
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from slmtvm.codegen.c_runtime import C_FLAGS
from slmtvm.codegen.zig import zig_cc
from slmtvm.errors import DeviceError
from slmtvm.runtime.interface import PROTOTYPES
from slmtvm.runtime.tokenizer import CompiledTokenizer
from slmtvm.target import host_target
from slmtvm.text import compile_tokenizer

RUNTIME = Path(__file__).parents[2] / "slmtvm" / "codegen" / "runtime"
_FOLDER = tempfile.TemporaryDirectory(prefix="slm-text-")


def text_sources() -> list[Path]:
    """The C files that turn text into tokens and back."""
    return [*sorted(RUNTIME.glob("text_*.c")), RUNTIME / "error.c", RUNTIME / "mapped.c"]


class TextOnly:
    """What ``CompiledTokenizer`` needs of a library."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.slm_last_error.restype = ctypes.c_char_p
        for name, (result, arguments) in PROTOTYPES.items():
            if name.startswith(("slm_token", "slm_detoken")):
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments

    def call(self, name: str, *arguments: object) -> int:
        result: int = getattr(self._library, name)(*arguments)
        if result < 0:
            raise DeviceError(self._library.slm_last_error().decode(errors="replace"))
        return result


@cache
def text_library() -> TextOnly:
    path = Path(_FOLDER.name) / "text.so"
    sources = [str(path) for path in text_sources()]
    zig_cc(
        host_target().link, [*C_FLAGS, "-shared", f"-I{RUNTIME}", *sources, "-o", path.name],
        folder=path.parent,
    )  # fmt: skip
    return TextOnly(path)


def compiled(tokenizer: Tokenizer, folder: Path) -> CompiledTokenizer:
    """``tokenizer`` compiled and opened; its file lies in ``folder``."""
    tables = compile_tokenizer(tokenizer.to_str().encode())
    (folder / "tokenizer.bin").write_bytes(tables)
    return CompiledTokenizer(text_library(), folder)
