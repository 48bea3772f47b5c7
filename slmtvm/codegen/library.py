"""A plan to one shared library: kernels, tables and the C runtime, linked for the target."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from slmtvm.codegen.c_runtime import C_FLAGS, runtime_object
from slmtvm.codegen.cuda.launches import write_cuda
from slmtvm.codegen.objects import write_object
from slmtvm.codegen.tables import kernel_symbol, write_tables
from slmtvm.codegen.weights import WeightsFile
from slmtvm.codegen.zig import zig_cc
from slmtvm.errors import TargetError
from slmtvm.plan.model import Plan
from slmtvm.target import Target

Progress = Callable[[str], None]

# What codegen/runtime/cpu.c can ask the CPU for.
KNOWN_FEATURES = {
    "x86_64": frozenset({
        "sse3", "pclmulqdq", "ssse3", "fma", "sse4_1", "sse4_2", "movbe", "popcnt", "avx", "f16c",
        "bmi1", "avx2", "bmi2", "avx512f", "avx512dq", "avx512ifma", "avx512cd", "avx512bw",
        "avx512vl", "avx512vbmi", "avx512_vbmi2", "gfni", "vaes", "vpclmulqdq", "avx512_vnni",
        "avx512_bitalg", "avx512_vpopcntdq", "abm",
    }),
    "aarch64": frozenset({
        "fp", "asimd", "aes", "pmull", "sha1", "sha2", "crc32", "atomics", "fphp", "asimdhp",
        "asimdrdm", "lrcpc", "asimddp", "sve", "sve2", "i8mm", "bf16",
    }),
    "riscv64": frozenset({"rvv"}),
}  # fmt: skip

# Only the C interface leaves the library, not the helpers that LLVM puts into kernels' objects.
_EXPORTS = "{ global: slm_*; local: *; };\n"
_LINK_FLAGS = ("-shared", "-s", "-Wl,--gc-sections", "-Wl,--build-id=none", "-Wl,-z,now", "-lm")


def build_library(
    plan: Plan,
    target: Target,
    path: Path,
    weights: WeightsFile,
    object_path: Path | None = None,
    *,
    progress: Progress | None = None,
) -> None:
    """Write the library of ``plan`` for ``target`` to ``path``; its file name becomes the soname.

    ``object_path``: where its kernels and tables are to be written as well, as one object without
    the runtime, which ``slmtvm.codegen.program`` links into programs.

    ``plan`` and ``weights`` come from ``merge_weights``: the library runs only with a weights file
    of that content. It exports the functions of slm.h and needs libc and libm only. Equal arguments
    give equal bytes. What is made on the way lies beside ``path``, so that one disk only must have
    room. Raises TargetError where the target asks for a CPU feature that the runtime cannot check,
    SlmError where linking fails, OSError where nothing can be written beside ``path``.
    """
    _check_features(target)
    say = progress or (lambda _message: None)
    runtime = resources.files("slmtvm.codegen") / "runtime"
    with (
        resources.as_file(runtime) as sources,
        tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as folder,
    ):
        _build(plan, target, path, weights, sources, Path(folder), say)
        if object_path is not None:
            (Path(folder) / "model.o").replace(object_path)


def _build(
    plan: Plan,
    target: Target,
    path: Path,
    weights: WeightsFile,
    sources: Path,
    folder: Path,
    say: Progress,
) -> None:
    (folder / "plan.c").write_text(write_tables(plan, target, weights), encoding="utf-8")
    (folder / "exports.map").write_text(_EXPORTS, encoding="utf-8")
    say(f"{target.name}: compiling {len(plan.kernels)} kernels")
    runtime = runtime_object(target.link, sources, folder, progress=say)
    if target.cuda is not None:
        (folder / "kernels.c").write_text(write_cuda(plan, target.cuda, folder), encoding="utf-8")
        executor = runtime_object(
            target.link, sources / "cuda", folder, headers=[sources], progress=say
        )
        code, needed = ["kernels.c", str(executor.absolute())], ["-ldl"]
    else:
        kernels = {kernel_symbol(n): plan.kernels[n].func for n in sorted(plan.kernels)}
        write_object(kernels, target, folder / "kernels.o")
        code, needed = ["kernels.o"], []
    say(f"{target.name}: linking")
    zig_cc(
        target.link,
        # What helps a debugger names the folder.
        [
            *C_FLAGS, "-g0", "-Wl,--strip-debug", f"-I{sources}", "-r", "-o", "model.o", "plan.c",
            *code,
        ],
        folder=folder,
        progress=say,
    )  # fmt: skip
    zig_cc(
        target.link,
        [
            *C_FLAGS, "-o", path.name, "model.o", str(runtime.absolute()), *_LINK_FLAGS, *needed,
            f"-Wl,-soname,{path.name}",
            "-Wl,--version-script=exports.map",
        ],
        folder=folder,
        progress=say,
    )  # fmt: skip
    (folder / path.name).replace(path)


def _check_features(target: Target) -> None:
    known = KNOWN_FEATURES.get(target.arch, frozenset())
    unknown = [name for name in target.requires if name not in known]
    if unknown:
        raise TargetError(
            f"requires {', '.join(unknown)}, which the runtime cannot check on {target.arch!r}; "
            f"it knows {', '.join(sorted(known)) or 'no such architecture'}",
            where=f"target {target.name}",
        )
