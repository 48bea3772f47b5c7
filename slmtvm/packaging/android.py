"""android: what an app's module takes, jniLibs, assets, slm.h and a sample in C++ and Kotlin.

Libraries are linked without the NDK: against stubs that name what the runtime may use of bionic,
from Android 9 (API 28) on. Segments are aligned for pages of 16 kB, which new devices have.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import resources
from importlib.abc import Traversable
from pathlib import Path

from slmtvm.codegen.c_runtime import C_FLAGS, runtime_object
from slmtvm.codegen.zig import zig_cc
from slmtvm.errors import SlmError
from slmtvm.packaging.contents import Contents
from slmtvm.packaging.options import Options

# Not riscv64: there the runtime catches signals, whose structures differ between musl and bionic.
ABIS = {"x86_64": "x86_64", "aarch64": "arm64-v8a"}
PAGE_BYTES = 16384
# What API 28 has and may be used; linking fails at anything else.
BIONIC = {
    "libc.so": (
        "__errno", "__sched_cpucount", "abort", "aligned_alloc", "atof", "atol", "calloc",
        "clock_gettime", "close", "dlclose", "dlopen", "dlsym", "free", "fstat", "getauxval",
        "getpid", "getrusage", "madvise", "malloc", "memchr", "memcmp", "memcpy", "memmove",
        "memset", "mlock", "mmap", "mprotect", "munmap", "open", "pthread_create",
        "pthread_getspecific", "pthread_join", "pthread_key_create", "pthread_key_delete",
        "pthread_self", "pthread_setspecific", "read", "realloc", "sched_getaffinity",
        "sched_setaffinity", "sigfillset", "sigprocmask",
        "snprintf", "sscanf", "strchr", "strcmp", "strcpy", "strcspn", "strerror", "strlen",
        "strncmp", "strrchr", "strstr", "strtod", "strtol", "strtoul", "strtoull", "syscall",
        "sysconf", "vsnprintf",
    ),
    "libm.so": ("cos", "exp", "expf", "log", "logf", "pow", "sin", "sqrt", "sqrtf"),
}  # fmt: skip
_EXPORTS = "{ global: slm_*; local: *; };\n"
_LINK_FLAGS = (
    "-shared", "-nostdlib", "-s", "-Wl,--gc-sections", "-Wl,--build-id=none", "-Wl,-z,now",
    f"-Wl,-z,max-page-size={PAGE_BYTES}", "-Wl,--hash-style=both", "-Wl,--no-undefined",
    "-Wl,--version-script=exports.map",
)  # fmt: skip
# The runtime is compiled as for musl: zig has no headers of bionic, which has no bcmp.
_COMPILE_FLAGS = ("-fno-builtin-bcmp", "-include", "bionic.h")


def write_android(several: Sequence[Contents], output: Path, options: Options) -> None:
    """The folder. Raises SlmError where two targets are for one ABI or one for none, or linking
    fails."""
    arches = [contents.entry.arch for contents in several]
    if len(set(arches)) != len(arches):
        raise SlmError("an app has one library an ABI: name one target of each", where="--target")
    for contents in several:
        if contents.entry.arch not in ABIS:
            raise SlmError(
                f"{contents.target} is {contents.entry.arch}, and apps are made for "
                f"{', '.join(ABIS)}",
                where="--target",
            )
    for contents in several:
        place = output / "jniLibs" / ABIS[contents.entry.arch]
        place.mkdir(parents=True)
        _link(contents, place / library_name(contents.name))
        for file in contents.papers:
            _copy(file.source, output / "share" / contents.target / Path(file.path).name)
    first = several[0]
    for file in first.bundle_files:
        if not file.path.startswith("bundle/lib/"):
            _copy(file.source, output / "assets" / "slm" / first.name / Path(file.path).name)
    _copy(first.header.source, output / "include" / "slm.h")
    names = {"@LIBRARY@": library_name(first.name)[3:-3], "@MODEL@": first.name}
    _copy_sample(resources.files("slmtvm.packaging") / "android_sample", output / "sample", names)


def library_name(model: str) -> str:
    """The library's file name and soname."""
    return f"libslm_{model.replace('-', '_')}.so"


def _link(contents: Contents, path: Path) -> None:
    arch = contents.entry.arch
    triple = f"{arch}-linux-android"
    work = path.parent / ".link"
    work.mkdir()
    stubs = []
    for name, symbols in BIONIC.items():
        lines = [f".globl {s}\n.type {s},%function\n{s}: .word 0\n" for s in symbols]
        (work / f"{name}.s").write_text("".join(lines), encoding="utf-8")
        stub = ["-nostdlib", "-shared", f"-Wl,-soname,{name}", "-o", name, f"{name}.s"]
        zig_cc(triple, stub, folder=work)
        stubs.append(f"./{name}")
    (work / "exports.map").write_text(_EXPORTS, encoding="utf-8")
    with resources.as_file(resources.files("slmtvm.codegen") / "runtime") as runtime:
        built = runtime_object(
            f"{arch}-linux-musl", runtime, work, headers=[runtime / "android"], flags=_COMPILE_FLAGS
        )
    model = contents.bundle.object(contents.target)
    zig_cc(
        triple,
        [
            *C_FLAGS, "-o", path.name, str(model.absolute()), str(built.absolute()), *stubs,
            *_LINK_FLAGS, f"-Wl,-soname,{path.name}",
        ],
        folder=work,
    )  # fmt: skip
    (work / path.name).replace(path)
    path.chmod(0o644)
    shutil.rmtree(work)


def _copy(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, place)


def _copy_sample(folder: Traversable, place: Path, names: dict[str, str]) -> None:
    place.mkdir()
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        text = file.read_text(encoding="utf-8")
        for name, value in names.items():
            text = text.replace(name, value)
        (place / file.name).write_text(text, encoding="utf-8")
