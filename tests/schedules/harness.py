"""Runs one kernel on numpy arrays: on this machine where it can, else under qemu-user.

The kernel's object is linked with driver.c into a static program, so that a foreign ISA needs no
sysroot, only qemu.
"""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import ziglang

from slmtvm.codegen.objects import write_object
from slmtvm.codegen.zig import caches, zig_cc
from slmtvm.schedules.kernel import Kernel
from slmtvm.target import Target
from tests.machines import is_native, lacking

QEMU = {
    "aarch64": [["qemu-aarch64-static", "-cpu", "max"]],
    "riscv64": [
        ["qemu-riscv64-static", "-cpu", f"rv64,v=true,vlen={vlen},vext_spec=v1.0"]
        for vlen in (128, 256)
    ],
}

_DRIVER = Path(__file__).with_name("driver.c")


def emulators(target: Target) -> list[list[str]]:
    """The command prefixes under which ``target`` can run here; skips the test if there is none."""
    if is_native(target):
        if reason := lacking(target):
            pytest.skip(reason)
        return [[]]
    found = [command for command in QEMU[target.arch] if shutil.which(command[0])]
    if not found:
        pytest.skip(f"no {QEMU[target.arch][0][0]} here")
    return found


def run(
    kernel: Kernel,
    inputs: dict[str, np.ndarray],
    target: Target,
    *,
    position: int = 0,
    valid: int = 0,
    cuts: tuple[int, ...] = (),
) -> dict[str, np.ndarray]:
    """Every buffer of the kernel after a run over its whole grid.

    Buffers that ``inputs`` lacks start as 0xA5 bytes. ``cuts`` divides the grid into several calls
    as threads would; those outside of it are left out. Where the target runs under several
    emulators (vector lengths), all agree.
    """
    prefixes = emulators(target)
    blobs = []
    for tensor in kernel.tensors:
        given = inputs.get(tensor.name)
        if given is None:
            given = np.empty(tensor.shape, tensor.dtype)
            given.view(np.uint8).fill(0xA5)
        fits = tensor.takes(given.shape) if tensor.at_most else given.shape == tensor.shape
        assert fits and given.dtype == tensor.dtype, (tensor, given.shape, given.dtype)
        blobs.append(np.ascontiguousarray(given).tobytes())
    bounds = [0, *(c for c in cuts if c < kernel.grid), kernel.grid]
    ambient = {"position": position, "valid": valid}
    numbers = [
        len(blobs), len(kernel.scalars), len(bounds),
        *map(len, blobs), *(ambient[name] for name in kernel.scalars), *bounds,
    ]  # fmt: skip
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "in").write_bytes(np.array(numbers, np.int64).tobytes() + b"".join(blobs))
        write_object({"kernel": kernel.func}, target, path / "kernel.o")
        _link(f"{target.arch}-linux-musl", path)
        for prefix in prefixes:
            command = [*prefix, str(path / "run"), str(path / "in"), str(path / "out")]
            subprocess.run(command, check=True, timeout=300)
            results.append((path / "out").read_bytes())
    assert all(r == results[0] for r in results), "results differ between vector lengths"
    outputs, at = {}, 0
    for tensor, blob in zip(kernel.tensors, blobs, strict=True):
        values = np.frombuffer(results[0][at : at + len(blob)], tensor.dtype).copy()
        outputs[tensor.name] = values if tensor.at_most else values.reshape(tensor.shape)
        at += len(blob)
    return outputs


@cache
def _made() -> Path:
    """A folder for what all kernels are linked with, while this process lives."""
    folder = Path(tempfile.mkdtemp(prefix="kernel-driver-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _linker(triple: str) -> tuple[str, ...]:
    """The command by which zig links ``kernel.o`` and the driver into ``run``.

    It is far quicker than ``zig cc``, which looks for all that it may have to build each time.
    """
    folder = _made() / triple
    folder.mkdir(exist_ok=True)
    (folder / "kernel.c").write_text("void kernel(void) {}\n")
    zig_cc(triple, ["-c", "kernel.c", "-o", "kernel.o"], folder=folder)
    zig_cc(triple, ["-O1", "-c", str(_DRIVER), "-o", "driver.o"], folder=folder)
    arguments = ["-O1", "-static", "-o", "run", str(folder / "driver.o"), "kernel.o", "-lm"]
    zig_cc(triple, arguments, folder=folder)  # builds what of a libc there is not yet
    environment = {
        **os.environ, **caches(), "ZIG_VERBOSE_LINK": "1", "ZIG_LOCAL_CACHE_DIR": str(folder),
    }  # fmt: skip
    zig = str(Path(ziglang.__file__).with_name("zig"))
    said = subprocess.run(
        [zig, "cc", "-target", triple, "-fno-sanitize=all", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = (line for line in said.stderr.splitlines() if line.startswith("ld.lld "))
    return (zig, *shlex.split(line))


def _link(triple: str, folder: Path) -> None:
    """Link ``kernel.o`` in ``folder`` with the driver into the static program ``run``."""
    subprocess.run(_linker(triple), cwd=folder, check=True, timeout=60)
