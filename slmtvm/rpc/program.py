"""Kernels to one static executable, which a runner calls and times by name.

It needs nothing on the device, not even a C library. ``slm_cpu_missing`` is asked before a kernel
runs, so that a program for another CPU ends with words and not with an illegal instruction.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

import numpy as np

from slmtvm.codegen.c_runtime import C_FLAGS, runtime_object
from slmtvm.codegen.objects import write_object
from slmtvm.codegen.zig import zig_cc
from slmtvm.errors import SlmError
from slmtvm.schedules.kernel import Kernel, Tensor
from slmtvm.target import Target

_LINK_FLAGS = ("-static", "-s", "-Wl,--gc-sections", "-Wl,--build-id=none", "-lm")
_NAME = re.compile(r"[A-Za-z_]\w{0,199}", re.ASCII)
MOST_BUFFERS, MOST_SCALARS = 32, 8  # as child/main.c has them


def build_program(
    kernels: Mapping[str, Kernel],
    target: Target,
    path: Path,
    *,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write the executable of ``kernels`` (name -> kernel) for ``target`` to ``path``.

    A client that loads it as a module calls a kernel with its tensors in order, scratch left out,
    then its scalars (0 where left out), then begin and end of a part of the grid if it wants one
    thread to compute that part only. "name@4" runs on 4 threads. "main" is the only kernel of a
    program that has one. Without kernels it still tells what the CPU lacks of ``target``. Raises
    SlmError where a name is no C identifier or a kernel has too many parameters.
    """
    for name, kernel in kernels.items():
        _check(name, kernel)
    runtime = resources.files("slmtvm.codegen") / "runtime"
    child = resources.files("slmtvm.rpc") / "child"
    with (
        resources.as_file(runtime) as sources,
        resources.as_file(child) as own,
        tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as name,
    ):
        folder = Path(name)
        (folder / "table.c").write_text(_table(kernels, target), encoding="utf-8")
        objects = []
        if kernels:
            functions = {f"slmk_{name}": kernel.func for name, kernel in kernels.items()}
            write_object(functions, target, folder / "kernels.o")
            objects = ["kernels.o"]
        triple = f"{target.arch}-linux-musl"
        threads = runtime_object(triple, sources, folder, progress=progress)
        zig_cc(
            triple,
            [*C_FLAGS, f"-I{sources}", f"-I{own}", "table.c", str(own / "main.c"),
             str(threads.absolute()), *objects, *_LINK_FLAGS, "-o", "program"],
            folder=folder,
            progress=progress,
        )  # fmt: skip
        (folder / "program").replace(path)


def _check(name: str, kernel: Kernel) -> None:
    if not _NAME.fullmatch(name):
        raise SlmError(f"{name!r} is no name for a kernel; it must be a C identifier")
    if len(kernel.tensors) > MOST_BUFFERS or len(kernel.scalars) > MOST_SCALARS:
        raise SlmError(f"{name} has more than {MOST_BUFFERS} tensors or {MOST_SCALARS} scalars")
    if any(t.name == "scratch" for t in kernel.tensors[:-1]):
        raise SlmError(f"{name} has its scratch before other tensors")


def _given(kernel: Kernel) -> list[Tensor]:
    return [t for t in kernel.tensors if t.name != "scratch"]


def _bytes(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize


def _table(kernels: Mapping[str, Kernel], target: Target) -> str:
    """The C source that kernels.h describes."""
    lines = ["#include <stddef.h>", '#include "kernels.h"']
    entries = []
    for name, kernel in kernels.items():
        tensors, count, scalars = _given(kernel), len(kernel.tensors), len(kernel.scalars)
        sizes = ", ".join(str(_bytes(t)) for t in tensors) or "0"
        changed = {*kernel.outputs, *kernel.state}
        written = ", ".join(str(int(t.name in changed)) for t in tensors) or "0"
        types = ", ".join(["void *"] * count + ["int32_t"] * (scalars + 2))
        values = [*(f"b[{i}]" for i in range(count)), *(f"s[{i}]" for i in range(scalars))]
        scratch = sum(_bytes(t) for t in kernel.tensors if t.name == "scratch")
        lines += [
            f"void slmk_{name}({types});",
            f"static void call_{name}(void *const *b, const int32_t *s, int32_t begin, "
            "int32_t end) {",
            f"  (void)b, (void)s, slmk_{name}({', '.join([*values, 'begin', 'end'])});",
            "}",
            f"static const uint64_t sizes_{name}[] = {{{sizes}}};",
            f"static const uint8_t written_{name}[] = {{{written}}};",
        ]
        entries.append(
            f'  {{"{name}", call_{name}, {len(tensors)}, {scalars}, {kernel.grid}, sizes_{name}, '
            f"written_{name}, {(scratch + 63) // 64 * 64}}},"
        )
    requires = "".join(f'"{feature}", ' for feature in target.requires)
    return "\n".join([
        *lines,
        "const slm_rpc_kernel slm_rpc_kernels[] = {", *(entries or ["  {0}"]), "};",
        f"const int32_t slm_rpc_kernel_count = {len(kernels)};",
        f"const char *const slm_rpc_requires[] = {{{requires}NULL}};",
        "",
    ])  # fmt: skip
