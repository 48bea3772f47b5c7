"""A plan's nodes compiled for a GPU, and the tables of how they are launched."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from slmtvm.codegen.cuda.choosing import Choosing, chooses
from slmtvm.codegen.cuda.nodes import MAX_THREADS, SHARED_BYTES, Node, nodes_of
from slmtvm.codegen.cuda.nvrtc import compile_both
from slmtvm.codegen.cuda.text import PERSISTENT, module_text, translate_plan
from slmtvm.codegen.tables import functions_in_order
from slmtvm.plan.model import Function, Plan
from slmtvm.schedules.isa.cuda import LANES
from slmtvm.target import CudaTarget

_TEAMS_OF_WARP = 2
# So many warps of a multiprocessor take turns while some wait for memory.
_WARPS_AT_ONCE = 32
# Blocks of threads of the persistent kernel on a multiprocessor, by its launch bounds.
_PERSISTENT_BLOCKS = 2


@dataclass(frozen=True)
class Launch:
    """``blocks`` blocks of ``teams`` teams of threads."""

    blocks: int
    teams: int
    shared_bytes: int


def launch(node: Node, gpu: CudaTarget) -> Launch:
    """How a node is spread over a GPU: over all of its multiprocessors before any has more than a
    warp, unless its kernel's knobs say how many teams a block of threads has; and by no more teams
    than can run at once, each of which then takes several blocks."""
    most, grid = MAX_THREADS // LANES, node.grid
    teams = _TEAMS_OF_WARP
    if node.runs > 1:
        widest = max(part.grid or 1 for part in node.parts)
        while teams < min(most, widest) and 2 * teams * node.team_bytes <= SHARED_BYTES:
            teams *= 2
        return Launch(node.runs, teams, teams * node.team_bytes)
    while teams < most and grid > gpu.multiprocessors * teams:
        teams *= 2
    teams = node.parts[-1].kernel.teams or teams
    while teams > 1 and node.between_bytes + teams * node.team_bytes > SHARED_BYTES:
        teams //= 2
    at_once = gpu.multiprocessors * _WARPS_AT_ONCE * _TEAMS_OF_WARP
    return Launch(
        min(-(-grid // teams), -(-at_once // teams)),
        teams,
        node.between_bytes + teams * node.team_bytes,
    )


@dataclass(frozen=True)
class Schedule:
    """What a GPU runs: nodes by function, in the order of the tables; and those of the functions of
    one row, which the persistent kernel does, in the order of their numbers there. ``choosing``:
    what stands at the end of heads of one row."""

    functions: list[tuple[Function, list[Node]]]
    persistent: list[Node] = field(default_factory=list)
    choosing: Choosing | None = None

    @property
    def nodes(self) -> list[Node]:
        """All, each once, in order of their names."""
        found = {node.name: node for _, nodes in self.functions for node in nodes}
        return [found[name] for name in sorted(found)]

    @property
    def text(self) -> str:
        """What a CUDA compiler takes."""
        return module_text(self.nodes, self.persistent)

    def persistent_teams(self) -> int:
        """Of a block of threads of the persistent kernel."""
        teams = MAX_THREADS // LANES
        while teams > 1 and self.persistent_bytes(teams) > SHARED_BYTES:
            teams //= 2
        return teams

    def persistent_bytes(self, teams: int) -> int:
        """Of shared memory, for a block of so many teams."""
        return max((n.between_bytes + teams * n.team_bytes for n in self.persistent), default=0)


def schedule(plan: Plan, gpu: CudaTarget) -> Schedule:
    """The nodes of a plan.

    Raises UnsupportedOpError where a kernel has no CUDA text, or takes too much shared memory.
    """
    kernels = translate_plan(plan)
    functions = [(f, nodes_of(plan, f, kernels)) for f in functions_in_order(plan)]
    choosing = Choosing.of(plan)
    for function, nodes in functions:
        if choosing is not None and chooses(function):
            nodes += choosing.nodes
    inside = {
        node.name: node
        for function, nodes in functions
        if gpu.persistent and function.rows == 1
        for node in nodes
    }
    return Schedule(functions, list(inside.values()), choosing)


def write_cuda(plan: Plan, gpu: CudaTarget, folder: Path) -> str:
    """The C text of ``slm_cuda`` (see codegen/runtime/cuda/plan.h) of a plan; writes the machine
    code that it includes into ``folder``, where it must be compiled.

    Raises TargetError where NVRTC is missing, UnsupportedOpError where a kernel has no CUDA text.
    """
    made = schedule(plan, gpu)
    image, text = compile_both(made.text, gpu.arch, gpu.release)
    ptx = text.encode() if gpu.ptx else b""
    (folder / "kernels.cubin").write_bytes(image)
    (folder / "kernels.ptx").write_bytes(ptx + b"\0")
    return "\n".join(
        [
            '#include "cuda/plan.h"',
            "",
            # The compiler's cache does not see the included file, but this.
            f"/* {hashlib.sha256(image + ptx).hexdigest()} */",
            *_included("slm_cuda_image", "kernels.cubin"),
            *_included("slm_cuda_ptx", "kernels.ptx"),
            "",
            *_tables(plan, made, gpu),
            "",
        ]
    )


def _included(symbol: str, file: str) -> list[str]:
    """The C text of a constant that is a file's content."""
    return [
        f'__asm__(".pushsection .rodata\\n.balign 64\\n.hidden {symbol}\\n"',
        f'        ".globl {symbol}\\n{symbol}:\\n.incbin \\"{file}\\"\\n.popsection\\n");',
        f'extern const char {symbol}[] __attribute__((visibility("hidden")));',
    ]


def _tables(plan: Plan, made: Schedule, gpu: CudaTarget) -> list[str]:
    entries = {node.name: i for i, node in enumerate(made.nodes)}
    numbers = {node.name: i for i, node in enumerate(made.persistent)}
    functions: list[str] = []
    launches: list[str] = []
    refs: list[str] = []
    most_teams = 0
    for _function, nodes in made.functions:
        functions.append(f"  {{{len(launches)}u, {len(nodes)}u}},")
        for node in nodes:
            spread = launch(node, gpu)
            most_teams = max(most_teams, spread.blocks * spread.teams)
            launches.append(
                f"  {{{entries[node.name]}, {len(node.refs)}, {spread.teams * LANES}, "
                f"{spread.shared_bytes}, {spread.blocks}u, {len(refs)}u, {node.grid}, "
                f"{numbers.get(node.name, -1)}}},"
            )
            refs += [f"  SLM_REF({ref.space.value}, {ref.offset}u)," for ref in node.refs]
    teams = made.persistent_teams()
    blocks = gpu.multiprocessors * _PERSISTENT_BLOCKS if made.persistent else 0
    most_teams = max(most_teams, blocks * teams)
    entry = f'"{PERSISTENT}"' if made.persistent else "0"
    choosing = made.choosing
    arena = choosing.arena_bytes if choosing else plan.arena_bytes
    chosen = choosing.chosen.offset if choosing else 0
    return [
        "static const char *const entries[] = {",
        *(f'  "{name}",' for name in entries),
        "};",
        "static const slm_cuda_list functions[] = {",
        *functions,
        "};",
        "static const slm_cuda_launch launches[] = {",
        *launches,
        "};",
        "static const uint64_t refs[] = {",
        *refs,
        "};",
        "const slm_cuda_plan slm_cuda = {",
        f'  entries, functions, launches, refs, slm_cuda_image, slm_cuda_ptx, "{gpu.arch}", '
        f"{plan.scratch_bytes * most_teams}u, {arena}u, {chosen}u,",
        f"  {len(entries)}, {len(refs)}u, {{{entry}, {blocks}u, {teams * LANES}, "
        f"{made.persistent_bytes(teams)}}}}};",
    ]
