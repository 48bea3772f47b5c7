"""Builds what scripts/bench_isa.py runs under emulation: both engines' programs, the plugin."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import slmtvm
from slmtvm.codegen.zig import cache_folder, zig_cc
from slmtvm.target import Target

HERE = Path(__file__).parent
RUNTIME = Path(slmtvm.__file__).parent / "codegen" / "runtime"
LLAMA_CPP_PYTHON = "llama-cpp-python==0.3.36"

# The CPU that zig compiles llama.cpp for: what our kernels of that target may use, no more.
ZIG_CPU = {"cortex-a78": "cortex_a78", "riscv64-rvv": "generic_rv64+m+a+f+d+c+v"}
# Static programs need no C library of the target where they are emulated.
STATIC_LIBC = "linux-musl"

_TOOLCHAIN = """set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR {arch})
set(CMAKE_C_COMPILER {bin}/cc)
set(CMAKE_CXX_COMPILER {bin}/c++)
set(CMAKE_AR {bin}/ar)
set(CMAKE_RANLIB {bin}/ranlib)
"""
# CMake's own -march is left out: zig is told the CPU by -mcpu and refuses other spellings.
_COMPILER = """#!/bin/sh
for a; do shift; case $a in -march=*) ;; *) set -- "$@" "$a" ;; esac; done
exec {python} -m ziglang {tool} -target {arch}-{libc} -mcpu={cpu} -fno-sanitize=all "$@"
"""
_ARCHIVER = """#!/bin/sh
exec {python} -m ziglang {tool} "$@"
"""
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=OFF",
    "-DGGML_OPENMP=OFF", "-DLLAMA_BUILD_COMMON=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_SERVER=OFF",
)  # fmt: skip


def count_plugin(target: Target, folder: Path) -> Path:
    """The TCG plugin, for the qemu of this machine that emulates ``target``."""
    version = subprocess.run(
        [f"qemu-{target.arch}", "--version"], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"version (\d+)\.", version)
    assert found, version
    api = 1 if int(found[1]) < 9 else 2
    path = folder / "count_plugin.so"
    subprocess.run(
        ["cc", "-O2", "-shared", "-fPIC", f"-DPLUGIN_API={api}", "-o", str(path),
         str(HERE / "count_plugin.c")],
        check=True,
    )  # fmt: skip
    return path


def slm_program(bundle: Path, target: Target, folder: Path) -> Path:
    """slm_decode, linked with the library of ``target`` in ``bundle``."""
    path = folder / f"slm_decode_{target.name}"
    library = bundle / "lib" / f"{target.name}.so"
    zig_cc(
        target.link,
        ["-O2", f"-I{RUNTIME}", "-o", str(path), str(HERE / "slm_decode.c"), str(library),
         f"-Wl,-rpath,{library.parent.resolve()}"],
    )  # fmt: skip
    return path


def llama_program(target: Target, cache: Path) -> Path:
    """llama_decode for ``target``, built from the source that llama-cpp-python ships.

    The first build takes minutes; ``cache`` keeps it.
    """
    folder = cache / f"llama-{target.name}"
    path, driver = folder / "llama_decode", HERE / "llama_decode.cpp"
    if path.exists() and path.stat().st_mtime > driver.stat().st_mtime:
        return path
    source = _llama_source(cache)
    folder.mkdir(parents=True, exist_ok=True)
    toolchain = _write_toolchain(target, folder)
    build = folder / "build"
    ninja = ("-G", "Ninja") if shutil.which("ninja") else ()
    _zig(["cmake", "-S", str(source), "-B", str(build), *ninja,
          f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", *_OPTIONS])  # fmt: skip
    _zig(["cmake", "--build", str(build), "--target", "llama", "--parallel", "1"])
    archives = sorted(str(p) for p in build.rglob("*.a"))
    _zig([str(folder / "bin" / "c++"), "-O2", "-static", f"-I{source}/include",
          f"-I{source}/ggml/include", "-o", str(path), str(driver),
          "-Wl,--start-group", *archives, "-Wl,--end-group"])  # fmt: skip
    return path


def _llama_source(cache: Path) -> Path:
    found = sorted(cache.glob("llama_cpp_python-*/vendor/llama.cpp"))
    if not found:
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(cache),
             "--no-binary", "llama-cpp-python", LLAMA_CPP_PYTHON],
            check=True,
        )  # fmt: skip
        (archive,) = cache.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(cache, filter="data")
        found = sorted(cache.glob("llama_cpp_python-*/vendor/llama.cpp"))
    return found[0]


def _write_toolchain(target: Target, folder: Path) -> Path:
    bin = folder / "bin"
    bin.mkdir(exist_ok=True)
    values = {
        "python": sys.executable,
        "arch": target.arch,
        "libc": STATIC_LIBC,
        "cpu": ZIG_CPU[target.name],
    }
    for tool in ("cc", "c++", "ar", "ranlib"):
        text = (_COMPILER if tool in ("cc", "c++") else _ARCHIVER).format(tool=tool, **values)
        (bin / tool).write_text(text)
        (bin / tool).chmod(0o755)
    toolchain = folder / "toolchain.cmake"
    toolchain.write_text(_TOOLCHAIN.format(bin=bin, arch=target.arch))
    return toolchain


def _zig(command: list[str]) -> None:
    zig = str(cache_folder())
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": zig, "ZIG_LOCAL_CACHE_DIR": zig}
    subprocess.run(command, env=environment, check=True)
