"""Runs one kernel on numpy arrays: on this machine where it can, else under qemu-user.

The kernel's object is linked with a small driver into a static program, so that a foreign ISA needs
no sysroot, only qemu.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from slmtvm.codegen.objects import write_object
from slmtvm.codegen.zig import zig_cc
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

_DRIVER = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
void %(name)s(%(signature)s);
static const size_t sizes[] = {%(sizes)s};
int main(int argc, char **argv) {
  void *buffer[%(count)d];
  FILE *in = fopen(argv[1], "rb"), *out = fopen(argv[2], "wb");
  for (int i = 0; i < %(count)d; ++i) {
    buffer[i] = aligned_alloc(64, (sizes[i] + 127) / 64 * 64);
    if (fread(buffer[i], 1, sizes[i], in) != sizes[i]) return 2;
  }
  int32_t position = atoi(argv[3]), valid = atoi(argv[4]);
  (void)position, (void)valid;
  for (int i = 5; i + 1 < argc; ++i) {
    int32_t begin = atoi(argv[i]), end = atoi(argv[i + 1]);
    %(name)s(%(arguments)s);
  }
  for (int i = 0; i < %(count)d; ++i) fwrite(buffer[i], 1, sizes[i], out);
  return fclose(out);
}
"""


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
    name = str(kernel.func.attrs["global_symbol"])
    count = len(blobs)
    source = _DRIVER % {
        "name": name,
        "signature": ", ".join(["void *"] * count + ["int32_t"] * (len(kernel.scalars) + 2)),
        "sizes": ", ".join(str(len(b)) for b in blobs),
        "count": count,
        "arguments": ", ".join(
            [f"buffer[{i}]" for i in range(count)] + [*kernel.scalars, "begin", "end"]
        ),
    }
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "driver.c").write_text(source)
        (path / "in").write_bytes(b"".join(blobs))
        write_object({name: kernel.func}, target, path / "kernel.o")
        zig_cc(
            f"{target.arch}-linux-musl",
            ["-O1", "-static", "-o", str(path / "run"), str(path / "driver.c"),
             str(path / "kernel.o"), "-lm"],
        )  # fmt: skip
        bounds = [str(b) for b in (0, *(c for c in cuts if c < kernel.grid), kernel.grid)]
        for prefix in prefixes:
            command = [*prefix, str(path / "run"), str(path / "in"), str(path / "out")]
            subprocess.run([*command, str(position), str(valid), *bounds], check=True, timeout=300)
            results.append((path / "out").read_bytes())
    assert all(r == results[0] for r in results), "results differ between vector lengths"
    outputs, at = {}, 0
    for tensor, blob in zip(kernel.tensors, blobs, strict=True):
        values = np.frombuffer(results[0][at : at + len(blob)], tensor.dtype).copy()
        outputs[tensor.name] = values if tensor.at_most else values.reshape(tensor.shape)
        at += len(blob)
    return outputs
