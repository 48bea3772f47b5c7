"""A plan's kernels compiled for a GPU, and the table of how its steps are launched."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from slmtvm.codegen.cuda.nvrtc import compile_cubin
from slmtvm.codegen.cuda.text import module_text, translate_plan
from slmtvm.codegen.cuda.translate import MAX_THREADS, CudaKernel
from slmtvm.codegen.tables import functions_in_order
from slmtvm.errors import UnsupportedOpError
from slmtvm.plan.model import Plan
from slmtvm.schedules.isa.cuda import LANES
from slmtvm.target import CudaTarget

_SHARED_BYTES = 48 << 10  # that a block of threads has on every GPU
_TEAMS_OF_WARP = 2
# So many warps of a multiprocessor take turns while some wait for memory.
_WARPS_AT_ONCE = 32


@dataclass(frozen=True)
class Launch:
    """``blocks`` blocks of ``teams`` teams of threads."""

    blocks: int
    teams: int
    shared_bytes: int


def launch(kernel: CudaKernel, grid: int, gpu: CudaTarget) -> Launch:
    """How a grid is spread over a GPU: over all of its multiprocessors before any has more than a
    warp, and by no more teams than can run at once, each of which then takes several blocks.

    Raises UnsupportedOpError where a kernel needs more shared memory than there is.
    """
    most = MAX_THREADS // LANES
    teams = _TEAMS_OF_WARP
    while teams < most and grid > gpu.multiprocessors * teams:
        teams *= 2
    while teams > 1 and teams * kernel.team_bytes > _SHARED_BYTES:
        teams //= 2
    if kernel.team_bytes > _SHARED_BYTES:
        raise UnsupportedOpError(
            f"needs {kernel.team_bytes:,} bytes of shared memory, a GPU has {_SHARED_BYTES:,}",
            where=f"kernel {kernel.name}",
        )
    at_once = gpu.multiprocessors * _WARPS_AT_ONCE * _TEAMS_OF_WARP
    return Launch(min(-(-grid // teams), -(-at_once // teams)), teams, teams * kernel.team_bytes)


def write_cuda(plan: Plan, gpu: CudaTarget, folder: Path) -> str:
    """The C text of ``slm_cuda`` (see codegen/runtime/cuda/plan.h) of a plan; writes the machine
    code that it includes into ``folder``, where it must be compiled.

    Raises TargetError where NVRTC is missing, UnsupportedOpError where a kernel has no CUDA text.
    """
    kernels = {k.name: k for k in translate_plan(plan)}
    by_name = dict(zip(sorted(plan.kernels), kernels.values(), strict=True))
    image = compile_cubin(module_text(kernels.values()), gpu.arch)
    (folder / "kernels.cubin").write_bytes(image)
    launches = [
        launch(by_name[step.kernel], by_name[step.kernel].grid or step.grid, gpu)
        for function in functions_in_order(plan)
        for step in function.steps
    ]
    most_teams = max(one.blocks * one.teams for one in launches)
    rows = [f"  {{{o.blocks}u, {o.teams * LANES}, {o.shared_bytes}}}," for o in launches]
    return "\n".join(
        [
            '#include "cuda/plan.h"',
            "",
            # The compiler's cache does not see the included file, but this.
            f"/* {hashlib.sha256(image).hexdigest()} */",
            '__asm__(".pushsection .rodata\\n.balign 64\\n.hidden slm_cuda_image\\n"',
            '        ".globl slm_cuda_image\\nslm_cuda_image:\\n.incbin \\"kernels.cubin\\"\\n"',
            '        ".popsection\\n");',
            'extern const char slm_cuda_image[] __attribute__((visibility("hidden")));',
            "",
            "static const char *const kernels[] = {",
            *(f'  "{name}",' for name in kernels),
            "};",
            "static const slm_cuda_launch launches[] = {",
            *rows,
            "};",
            "const slm_cuda_plan slm_cuda = {kernels, launches, slm_cuda_image, "
            f"{plan.scratch_bytes * most_teams}u}};",
            "",
        ]
    )
