"""All nodes of a plan as one CUDA text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources

from slmtvm.codegen.cuda.nodes import MAX_THREADS, Node, Part
from slmtvm.codegen.cuda.translate import CudaKernel, translate
from slmtvm.errors import UnsupportedOpError
from slmtvm.plan.model import KernelCode, Plan, Space
from slmtvm.schedules.kernel import Tunable

DEVICE_TEXT = (resources.files("slmtvm.codegen.cuda") / "slm_device.h").read_text(encoding="utf-8")
"""What the text of every kernel needs before it."""

PERSISTENT = "slm_persistent"
"""The entry that does all nodes of a function in one launch."""


def translate_plan(plan: Plan) -> dict[str, CudaKernel]:
    """The kernels of a plan by name, in order of their names.

    Raises UnsupportedOpError where one has no CUDA text.
    """
    with_scratch = {
        step.kernel
        for function in plan.functions
        for step in function.steps
        if step.args[-1].space == Space.SCRATCH
    }
    return {
        name: _translate(name, code, name in with_scratch)
        for name, code in sorted(plan.kernels.items())
    }


def _translate(name: str, code: KernelCode, scratch: bool) -> CudaKernel:
    try:
        teams = teams_of(code.tunable)
        return translate(f"kernel_{name}", code.func, code.scalars, scratch, teams)
    except UnsupportedOpError as error:
        raise UnsupportedOpError(
            f"{error}; compile the model for the CPU", where=f"kernel {name}"
        ) from error


def teams_of(tunable: Tunable | None) -> int:
    """Of a block of threads, as a kernel's knobs have it; 0 where they leave it to the grid."""
    return tunable.knobs.get("teams", 0) if tunable else 0


def module_text(nodes: Iterable[Node], persistent: Sequence[Node] = ()) -> str:
    """What a CUDA compiler takes: an entry for each node, and one for all of ``persistent``, whose
    numbers are their places there."""
    entries = {node.name: node for node in nodes}
    inside = {node.name: node for node in persistent}
    kernels = {
        part.kernel.name: part.kernel for node in (entries | inside).values() for part in node.parts
    }
    return "\n".join(
        [
            DEVICE_TEXT,
            *(kernel.text for kernel in kernels.values()),
            *(_run_text(node) for node in (entries | inside).values()),
            *(_entry_text(node) for node in entries.values()),
            *([_persistent_text(list(inside.values()))] if inside else []),
        ]
    )


def _run_text(node: Node) -> str:
    """A device function that does a block of threads' share of a node."""
    parameters = node.parameters
    takes = "".join(f"{p.pointer}{p.name}, " for p in parameters)
    lines = []
    if node.runs > 1:
        lines.append(f"for (int run = blockIdx.x; run < {node.runs}; run += gridDim.x) {{")
        for part in node.parts:
            lines += [
                f"  for (int i = own.index; i < {part.grid}; i += own.count)",
                f"    {part.kernel.name}(own, run * {part.grid} + i, "
                f"{_given(node, part)}position, valid);",
                "  __syncthreads();",
            ]
        lines.append("}")
    for part in node.parts if node.runs == 1 else ():
        last = part is node.parts[-1]
        team = "t" if last else "own"
        grid = "grid" if part.grid is None else str(part.grid)
        if not last or len(node.parts) > 1:
            lines.append("__syncthreads();" if part is not node.parts[0] else "")
        lines += [
            f"for (int block = {team}.index; block < {grid}; block += {team}.count)",
            f"  {part.kernel.name}({team}, block, {_given(node, part)}position, valid);",
        ]
    return "\n".join(
        [
            f"SLM_DEVICE void run_{node.name}(const slm_team t, {takes}int position, int valid, "
            "int grid) {",
            *(["  const slm_team own = slm_of_block(t);"] if len(node.parts) > 1 else []),
            *(f"  {line}" for line in lines if line),
            "}",
            "",
        ]
    )


def _given(node: Node, part: Part) -> str:
    given, parameters = [], node.parameters
    for argument, own in zip(part.arguments, part.kernel.parameters, strict=True):
        if argument < 0:
            given.append(f"({own.kind} *)(slm_shared + {-1 - argument})")
            continue
        name = parameters[argument].name
        if parameters[argument].kind != own.kind:
            name = f"({'' if own.writes else 'const '}{own.kind} *){name}"
        given.append(name)
    if part.kernel.scratch_bytes:
        # All steps' alike: a team may be in another one, in scratch that is its own still.
        size = f"sizeof({part.kernel.parameters[-1].kind})"
        given[-1] += f" + (size_t)t.index * ({node.scratch_bytes} / {size})"
    return "".join(f"{text}, " for text in given)


def _entry_text(node: Node) -> str:
    takes = "".join(f"{p.pointer}{p.name}, " for p in node.parameters)
    names = "".join(f"{p.name}, " for p in node.parameters)
    return "\n".join(
        [
            f'extern "C" __global__ void __launch_bounds__({MAX_THREADS}, 2)',
            f"    {node.name}({takes}const int *ambient, int grid) {{",
            f"  const slm_team t = slm_this_team({node.between_bytes}, {node.team_bytes});",
            f"  run_{node.name}(t, {names}ambient[0], ambient[1], grid);",
            "}",
            "",
        ]
    )


def _persistent_text(nodes: Sequence[Node]) -> str:
    """The entry that does a list of nodes, one after the other, all blocks together.

    Its pointers come from memory, so nothing makes the compiler think that nobody writes there.
    Nodes are calls: registers are then those of the hungriest, and none of them spills.
    """
    lines, cases = [], []
    for number, node in enumerate(nodes):
        given = "".join(f"({p.kind} *)p[{i}], " for i, p in enumerate(node.parameters))
        lines += [
            f"static __device__ __noinline__ void persistent_{number}(",
            "    const unsigned long long *p, int position, int valid, int grid) {",
            f"  const slm_team t = slm_spread_team({node.between_bytes}, {node.team_bytes});",
            f"  run_{node.name}(t, {given}position, valid, grid);",
            "}",
        ]
        cases.append(
            f"      case {number}: persistent_{number}(p, position, valid, one.grid); break;"
        )
    return "\n".join(
        [
            *lines,
            f'extern "C" __global__ void __launch_bounds__({MAX_THREADS}, 2)',
            f"    {PERSISTENT}(const slm_work *work, const unsigned long long *pointers, "
            "unsigned *arrived,",
            "                   const int *ambient, int count, unsigned passed) {",
            "  const int position = ambient[0], valid = ambient[1];",
            "  for (int i = 0; i < count; ++i) {",
            "    const slm_work one = work[i];",
            "    const unsigned long long *const p = pointers + one.first;",
            "    if (i) slm_meet_grid(arrived, passed += gridDim.x);",
            "    switch (one.node) {",
            *cases,
            "    }",
            "  }",
            "}",
            "",
        ]
    )
