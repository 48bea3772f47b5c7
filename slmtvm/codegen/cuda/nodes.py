"""Nodes of a GPU's graph: a step of the plan, and small ones before it, done again by each block.

Or two steps of which a run of blocks needs only the same run of the other: a block of threads each.

A launch costs more than the work of a norm or of quantizing a row, and nobody else reads what these
make. So every block of threads of the step that does computes them for itself, into shared memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slmtvm.codegen.cuda.translate import CudaKernel, Parameter
from slmtvm.errors import UnsupportedOpError
from slmtvm.plan.model import Function, Plan, Ref, Space

MAX_THREADS = 256
"""Of a block of threads: 16 teams."""

SHARED_BYTES = 48 << 10
"""That a block of threads has on every GPU."""

MOST_STEPS = 3
"""Of a node; MAX_POINTERS of runtime/cuda/executor.c has room for so many."""

_ALIGNMENT = 16  # bytes, in shared memory
# What every block of threads may compute and read again: a norm with its weights, of a wide row.
_MOST_BYTES = 64 << 10
_MOST_BETWEEN = 16 << 10  # bytes in shared memory between a node's steps


@dataclass(frozen=True)
class Part:
    """A step of a node: block by block ``kernel``, on the node's ``arguments`` of these numbers.

    A negative one, ``-1 - offset``, lies in shared memory from ``offset`` bytes on.
    """

    kernel: CudaKernel
    arguments: tuple[int, ...]
    grid: int | None  # None: what the node is told; of a node with runs, a run's


@dataclass(frozen=True)
class Node:
    """Steps that one launch does; all but the last are done by each block of threads for itself.

    ``name`` is the entry's: nodes of one name have the same text. ``refs`` are its arguments,
    ``grid`` is the last step's. Where there are ``runs``, a block of threads does one of them,
    of all steps.
    """

    name: str
    parts: tuple[Part, ...]
    refs: tuple[Ref, ...]
    grid: int
    between_bytes: int = 0
    runs: int = 1

    @property
    def team_bytes(self) -> int:
        """Of shared memory, each team's own."""
        return max(part.kernel.team_bytes for part in self.parts)

    @property
    def scratch_bytes(self) -> int:
        """Each team's own, in the plan's scratch."""
        return max(part.kernel.scratch_bytes for part in self.parts)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """What each of ``refs`` is."""
        found: dict[int, Parameter] = {}
        for part in self.parts:
            for index, given in zip(part.arguments, part.kernel.parameters, strict=True):
                known = found.setdefault(index, given)
                found[index] = Parameter(
                    f"p{index}",
                    given.kind,
                    known.reads or given.reads,
                    known.writes or given.writes,
                )
        return tuple(found[i] for i in range(len(self.refs)))


def single(kernel: CudaKernel, refs: Sequence[Ref], grid: int) -> Node:
    """A step alone."""
    part = Part(kernel, tuple(range(len(kernel.parameters))), kernel.grid)
    return Node(f"node_{kernel.name}", (part,), tuple(refs), kernel.grid or grid)


def nodes_of(plan: Plan, function: Function, kernels: Mapping[str, CudaKernel]) -> list[Node]:
    """The nodes of a function, whose ``kernels`` are by the plan's names.

    Raises UnsupportedOpError where a kernel needs more shared memory than there is.
    """
    finder = _Finder(plan, function, kernels)
    nodes: list[Node] = []
    end = len(function.steps)
    while end:
        first = finder.first_of_node(end - 1)
        nodes.append(finder.node(first, end))
        end = first
    return nodes[::-1]


def overlap(a: Ref, b: Ref) -> bool:
    """Whether two places share a byte."""
    return a.space == b.space and a.offset < b.offset + b.size and b.offset < a.offset + a.size


class _Finder:
    def __init__(self, plan: Plan, function: Function, kernels: Mapping[str, CudaKernel]) -> None:
        self._plan, self._function, self._kernels = plan, function, kernels

    def _refs(self, index: int, *, reads: bool = False, writes: bool = False) -> list[Ref]:
        step = self._function.steps[index]
        given = zip(step.args, self._kernels[step.kernel].parameters, strict=True)
        return [ref for ref, p in given if (reads and p.reads) or (writes and p.writes)]

    def first_of_node(self, last: int) -> int:
        """The first of the steps that the one launch of step ``last`` does."""
        if self._function.rows > 1:  # rows are then work enough for a launch
            return last
        if last and self._share_runs(last - 1, last):
            return last - 1
        least = last
        while least > max(0, last + 1 - MOST_STEPS) and self._is_small(least - 1):
            least -= 1
        return next(f for f in range(least, last + 1) if f == last or self._can_join(f, last))

    def runs_of(self, index: int) -> int:
        return self._plan.kernels[self._function.steps[index].kernel].runs

    def _share_runs(self, index: int, last: int) -> bool:
        if self.runs_of(index) == 1 or self.runs_of(index) != self.runs_of(last):
            return False
        # Blocks that are ahead must not write what others have yet to read.
        written = [r for r in self._refs(last, writes=True) if r.space != Space.SCRATCH]
        return not any(overlap(r, w) for r in self._refs(index, reads=True) for w in written)

    def _is_small(self, index: int) -> bool:
        """Whether every block of threads may do a step for itself."""
        step = self._function.steps[index]
        return (
            self._plan.kernels[step.kernel].tunable is None
            and sum(ref.size for ref in step.args) <= _MOST_BYTES
            and {ref.space for ref in step.args} <= {Space.ARENA, Space.WEIGHTS}
        )

    def _can_join(self, first: int, last: int) -> bool:
        made: list[Ref] = []
        for index in range(first, last):
            read, written = self._refs(index, reads=True), self._refs(index, writes=True)
            if set(read) & set(written):
                return False
            # Blocks that are ahead must not write what others have yet to read.
            outside = [r for r in read if r not in made]
            if any(overlap(r, w) for r in outside for w in self._refs(last, writes=True)):
                return False
            if not all(self._only_read_until(ref, index, last) for ref in written):
                return False
            made += written
        return sum(_aligned(ref.size) for ref in made) <= _MOST_BETWEEN

    def _only_read_until(self, made: Ref, index: int, last: int) -> bool:
        """Whether what a step made is read by steps up to ``last`` alone, and as it was made."""
        alive = [(made.offset, made.offset + made.size)]
        for i in range(index + 1, len(self._function.steps)):
            for ref in self._refs(i, reads=True):
                if _touches(ref, made, alive) and (i > last or ref != made):
                    return False
            for ref in self._refs(i, writes=True):
                if ref.space == made.space:
                    alive = _without(alive, ref.offset, ref.offset + ref.size)
        return not _touches(self._plan.hidden, made, alive)

    def node(self, first: int, end: int) -> Node:
        """The node of steps ``first`` to ``end``."""
        steps = self._function.steps[first:end]
        runs = self.runs_of(end - 1) if end - first > 1 else 1
        shared: dict[Ref, int] = {}
        at = 0
        refs: list[Ref] = []
        parts = []
        for step in steps:
            kernel, arguments = self._kernels[step.kernel], []
            for ref, parameter in zip(step.args, kernel.parameters, strict=True):
                if runs == 1 and parameter.writes and step is not steps[-1]:
                    shared[ref] = at
                    at += _aligned(ref.size)
                elif parameter.writes or ref not in shared:
                    if ref not in refs:
                        refs.append(ref)
                    arguments.append(refs.index(ref))
                    continue
                arguments.append(-1 - shared[ref])
            grid = kernel.grid or (None if step is steps[-1] else step.grid)
            parts.append(Part(kernel, tuple(arguments), grid))
        name = _name(parts)
        grid = parts[-1].grid or steps[-1].grid
        if runs > 1:
            parts = [replace(p, grid=s.grid // runs) for p, s in zip(parts, steps, strict=True)]
            name = _name(parts, runs)
        node = Node(name, tuple(parts), tuple(refs), grid, at, runs)
        if node.team_bytes + at > SHARED_BYTES:
            raise UnsupportedOpError(
                f"needs {node.team_bytes:,} bytes of shared memory, a GPU has {SHARED_BYTES:,}",
                where=f"kernel {steps[-1].kernel}",
            )
        return node


def _name(parts: Sequence[Part], runs: int = 1) -> str:
    """A name that says what the text depends on."""
    if len(parts) == 1 and parts[0].arguments == tuple(range(len(parts[0].arguments))):
        return f"node_{parts[0].kernel.name}"
    said = repr([runs, *((p.kernel.name, p.arguments, p.grid) for p in parts)])
    digest = hashlib.sha256(said.encode()).hexdigest()[:8]
    return f"node_{digest}_{parts[-1].kernel.name}"


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


_Spans = list[tuple[int, int]]


def _touches(ref: Ref, made: Ref, alive: _Spans) -> bool:
    """Whether ``ref`` has a byte of what is left of ``made``."""
    same = ref.space == made.space
    return same and any(b < ref.offset + ref.size and ref.offset < e for b, e in alive)


def _without(spans: _Spans, begin: int, end: int) -> _Spans:
    cut = [part for b, e in spans for part in ((b, min(e, begin)), (max(b, end), e))]
    return [(b, e) for b, e in cut if b < e]
