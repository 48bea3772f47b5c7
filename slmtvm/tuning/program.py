"""A static program for any target that measures several kernels of one task."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from slmtvm.codegen.c_runtime import runtime_object
from slmtvm.codegen.objects import write_object
from slmtvm.codegen.zig import zig_cc
from slmtvm.schedules.kernel import Kernel
from slmtvm.target import Target
from slmtvm.tuning.inputs import Fill, fills_of

_LINK_FLAGS = ("-std=gnu11", "-O1", "-static", "-s", "-Wl,--gc-sections")


@dataclass(frozen=True)
class Situation:
    """Where in a sequence the measured call stands: the ambient scalars that kernels take."""

    position: int = 0
    valid: int = 1


def build_program(
    kernels: Sequence[Kernel],
    target: Target,
    situation: Situation,
    progress: Callable[[str], None] | None = None,
    *,
    fills: Callable[[Kernel], list[Fill]] = fills_of,
) -> bytes:
    """The program of measure.c for ``kernels``, the first of which is the reference.

    It needs no library and no loader on the device. fills: how a kernel's buffers are filled.
    Raises SlmError where something cannot be compiled.
    """
    triple = f"{target.arch}-linux-musl"
    symbols = [f"candidate_{i}" for i in range(len(kernels))]
    package = resources.files("slmtvm")
    with (
        resources.as_file(package / "tuning" / "measure") as measure,
        resources.as_file(package / "codegen" / "runtime") as runtime,
        tempfile.TemporaryDirectory(prefix="slmtvm-tune-") as name,
    ):
        folder = Path(name)
        fixed = [
            runtime_object(triple, runtime, folder, progress=progress),
            runtime_object(triple, measure, folder, headers=[runtime], progress=progress),
        ]
        write_object(
            {s: k.func for s, k in zip(symbols, kernels, strict=True)}, target, folder / "kernels.o"
        )
        calls = [_call(k, s) for k, s in zip(kernels, symbols, strict=True)]
        (folder / "table.c").write_text(
            "\n".join(
                [
                    *candidates_table(kernels, calls, [1] * len(kernels), situation, fills),
                    "const slm_place *const slm_measured_place = 0;",
                    "",
                ]
            ),
            encoding="utf-8",
        )
        zig_cc(
            triple,
            [*_LINK_FLAGS, f"-I{measure}", "-o", "measure", "table.c", *map(str, fixed),
             "kernels.o", "-lm"],
            folder=folder, progress=progress,
        )  # fmt: skip
        return (folder / "measure").read_bytes()


def candidates_table(
    kernels: Sequence[Kernel],
    calls: Sequence[Sequence[str]],
    scratches: Sequence[int],
    situation: Situation,
    fills_of: Callable[[Kernel], list[Fill]],
) -> list[str]:
    """The lines of C that measure.h describes, but where buffers lie.

    ``calls``: of each kernel the lines that stand before, and in, the function that calls it;
    ``scratches``: how often each needs its scratch.
    """
    lines = ['#include "measure.h"']
    entries = []
    for number, (kernel, call) in enumerate(zip(kernels, calls, strict=True)):
        symbol, fills = f"candidate_{number}", fills_of(kernel)
        given = [_given(f"{symbol}_{i}", f) for i, f in enumerate(fills)]
        lines += [text for _, text in given if text]
        lines.append(f"static const slm_measured_buffer {symbol}_buffers[] = {{")
        lines += [_buffer(f, pointer) for f, (pointer, _) in zip(fills, given, strict=True)]
        lines += [
            "};",
            *call[:-1],
            f"static void run_{symbol}(void **a, int32_t position, int32_t valid, int32_t begin, "
            "int32_t end) {",
            f"  (void)position, (void)valid, (void)begin, (void)end;\n  {call[-1]}\n}}",
        ]
        entries.append(
            f"  {{run_{symbol}, {kernel.grid}, {len(fills)}, {symbol}_buffers, "
            f"{scratches[number] * _scratch_bytes(kernel)}}},"
        )
    return [
        *lines,
        f"const int slm_candidate_count = {len(kernels)};",
        "const slm_candidate slm_candidates[] = {",
        *entries,
        "};",
        f"const int32_t slm_measured_position = {situation.position};",
        f"const int32_t slm_measured_valid = {situation.valid};",
    ]


def _given(name: str, fill: Fill) -> tuple[str, str]:
    """The expression for a buffer's given content, and the text that defines it."""
    if not fill.given:
        return "0", ""
    values = ", ".join(map(str, np.frombuffer(fill.given, np.int32)))
    return f"{name}_given", f"static const int32_t {name}_given[] = {{{values}}};"


def _buffer(fill: Fill, given: str) -> str:
    return (
        f"  {{{fill.size}, {fill.kind}, {float(fill.low)!r}, {float(fill.high)!r}, {fill.of}, "
        f"{int(fill.cycled)}, {int(fill.result)}, {given}}},"
    )


def _call(kernel: Kernel, symbol: str) -> list[str]:
    """A kernel's declaration, and its call with its buffers from an array."""
    count = len(kernel.tensors)
    types = ", ".join(["void *"] * count + ["int32_t"] * (len(kernel.scalars) + 2))
    values = ", ".join([*(f"a[{i}]" for i in range(count)), *kernel.scalars, "begin", "end"])
    return [f"void {symbol}({types});", f"{symbol}({values});"]


def _scratch_bytes(kernel: Kernel) -> int:
    return sum(
        math.prod(t.shape) * np.dtype(t.dtype).itemsize
        for t in kernel.tensors
        if t.name == "scratch"
    )
