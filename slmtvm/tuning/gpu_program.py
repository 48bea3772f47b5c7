"""A program that measures several kernels of one task on a GPU: measure.c with another place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from slmtvm.codegen.c_runtime import C_FLAGS, runtime_object
from slmtvm.codegen.cuda.launches import launch
from slmtvm.codegen.cuda.nodes import Node, single
from slmtvm.codegen.cuda.nvrtc import compile_cubin
from slmtvm.codegen.cuda.text import module_text, teams_of
from slmtvm.codegen.cuda.translate import translate
from slmtvm.codegen.zig import zig_cc
from slmtvm.plan.model import Ref, Space
from slmtvm.schedules.isa.cuda import LANES
from slmtvm.schedules.kernel import Kernel
from slmtvm.target import Target
from slmtvm.tuning.inputs import Fill, fills_of
from slmtvm.tuning.program import Situation, candidates_table


def build_gpu_program(
    kernels: Sequence[Kernel],
    target: Target,
    situation: Situation,
    progress: Callable[[str], None] | None = None,
    *,
    fills: Callable[[Kernel], list[Fill]] = fills_of,
) -> bytes:
    """``build_program`` for a target with a GPU, whose kernels each run as a launch of their own.

    On the device it needs a C library and a CUDA driver, which it opens when it runs. Raises
    SlmError where something cannot be compiled, TargetError without NVRTC.
    """
    assert target.cuda is not None
    nodes = [_node(f"candidate_{i}", kernel) for i, kernel in enumerate(kernels)]
    image = compile_cubin(module_text(nodes), target.cuda.arch, target.cuda.release)
    spreads = [launch(node, target.cuda) for node in nodes]
    package = resources.files("slmtvm")
    with (
        resources.as_file(package / "tuning" / "measure") as measure,
        resources.as_file(package / "codegen" / "runtime") as runtime,
        tempfile.TemporaryDirectory(prefix="slmtvm-tune-") as name,
    ):
        folder = Path(name)
        (folder / "kernels.cubin").write_bytes(image)
        calls = [[f"slm_gpu_run({i}, a);"] for i in range(len(kernels))]
        table = candidates_table(
            kernels, calls, [s.blocks * s.teams for s in spreads], situation, fills
        )
        lines = [
            '#include "gpu/gpu.h"',
            *table,
            '__asm__(".pushsection .rodata\\n.balign 64\\n.hidden slm_kernels\\n"',
            '        ".globl slm_kernels\\nslm_kernels:\\n.incbin \\"kernels.cubin\\"\\n"',
            '        ".popsection\\n");',
            'extern const char slm_kernels[] __attribute__((visibility("hidden")));',
            "const void *const slm_gpu_image = slm_kernels;",
            "const slm_place *const slm_measured_place = &slm_gpu;",
            "const slm_gpu_launch slm_gpu_launches[] = {",
            *(
                f'  {{"{node.name}", {len(node.refs)}, {s.blocks}u, {s.teams * LANES}u, '
                f"{s.shared_bytes}u, {node.grid}}},"
                for node, s in zip(nodes, spreads, strict=True)
            ),
            "};",
            "",
        ]
        (folder / "table.c").write_text("\n".join(lines), encoding="utf-8")
        triple, given = target.link, [measure, runtime, runtime / "cuda"]
        objects = [
            runtime_object(triple, runtime, folder, progress=progress),
            runtime_object(triple, measure, folder, headers=[runtime], progress=progress),
            runtime_object(triple, measure / "gpu", folder, headers=given, progress=progress),
        ]
        zig_cc(
            triple,
            [*C_FLAGS, *(f"-I{path}" for path in given), "-s", "-Wl,--gc-sections", "-o", "measure",
             "table.c", str(runtime / "cuda" / "driver.c"),
             *(str(path.absolute()) for path in objects), "-lm", "-ldl", "-lpthread"],
            folder=folder, progress=progress,
        )  # fmt: skip
        return (folder / "measure").read_bytes()


def _node(name: str, kernel: Kernel) -> Node:
    scratch = kernel.tensors[-1].name == "scratch"
    made = translate(name, kernel.func, kernel.scalars, scratch, teams_of(kernel.tunable))
    return single(made, [Ref(Space.ARENA, 0, 0)] * len(kernel.tensors), kernel.grid)
