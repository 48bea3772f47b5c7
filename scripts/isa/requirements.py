"""What scripts/bench_isa.py needs beside Python's packages, and which Debian packages bring it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from isa.loops import llvm_mca

SYSROOTS = {"aarch64": Path("/usr/aarch64-linux-gnu"), "riscv64": Path("/usr/riscv64-linux-gnu")}
_LIBC = {"aarch64": "libc6-arm64-cross", "riscv64": "libc6-riscv64-cross"}
# What a model's folder must hold for one precision.
MODEL_FILES = ("{precision}/model.onnx", "{precision}.gguf")


def missing_tools(archs: Sequence[str], *, emulated: bool = False) -> list[str]:
    """A line for each program or C library that is not here, and the package that has it; where
    kernels alone are ``emulated``, of what that needs."""
    tools = {
        "cc": "gcc",
        "cmake": "cmake",
        llvm_mca(): "llvm",
        **{f"qemu-{arch}": "qemu-user (qemu-user-static has no plugins)" for arch in archs},
    }
    if emulated:
        tools = {name: has for name, has in tools.items() if name == "cc" or "qemu" in name}
        archs = ()  # programs are static
    lines = [f"{tool}: package {has}" for tool, has in tools.items() if shutil.which(tool) is None]
    lines += [
        f"{SYSROOTS[arch]}: package {_LIBC[arch]}" for arch in archs if not SYSROOTS[arch].is_dir()
    ]
    return lines


def missing_models(folder: Path, models: Sequence[str], precisions: Sequence[str]) -> list[Path]:
    """The files of scripts/make_bench_models.py that are wanted and not in ``folder``."""
    paths = [
        folder / model / file.format(precision=precision)
        for model in models
        for precision in precisions
        for file in MODEL_FILES
    ]
    return [path for path in paths if not path.is_file()]
