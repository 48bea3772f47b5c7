"""A kernel's TIR to CUDA text: vectors become teams of threads, a block of the grid a team's work.

Every float is computed by the operations of the TIR, in their order, so that results have the bits
of a CPU's. A team computes scalars in each of its threads alike; so its threads always take the
same way, and meet where they exchange lanes or read what another wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tvm import tirx

from slmtvm.codegen.cuda.graph_loops import outer_loop
from slmtvm.codegen.cuda.hazards import Access, Hazards, accesses
from slmtvm.codegen.cuda.values import (
    C_TYPES,
    Expr,
    Value,
    Values,
    parts_of,
    place,
    size_of,
    type_of,
    unsupported,
)
from slmtvm.schedules.isa.cuda import LANES
from slmtvm.schedules.kernel import AMBIENT_SCALARS, FLAT

ALIGNMENT = 16  # bytes, of arrays in shared memory


@dataclass(frozen=True)
class Parameter:
    """A buffer of a kernel: ``kind`` is its C type, that of an element."""

    name: str
    kind: str
    reads: bool
    writes: bool

    @property
    def pointer(self) -> str:
        """Its C type; what is only read may be read by the way that assumes that nobody writes."""
        return f"{self.kind} *" if self.writes else f"const {self.kind} *__restrict__ "


@dataclass(frozen=True)
class CudaKernel:
    """A kernel's text, which defines the device function ``name``: one block of the grid.

    It takes the team, the block, the ``parameters``, and the ambient scalars position and valid.
    The grid is ``grid`` whatever the plan says where that is not None. ``team_bytes`` of dynamic
    shared memory are each team's. The last parameter is scratch where ``scratch_bytes`` is not
    0: each team needs so many. ``teams`` of a block of threads do it, 0 for any number.
    """

    name: str
    text: str
    parameters: tuple[Parameter, ...]
    team_bytes: int
    grid: int | None = None
    scratch_bytes: int = 0
    teams: int = 0


@dataclass
class _Array:
    """A local array in shared memory, ``offset`` bytes from the team's."""

    offset: int


def translate(
    name: str, func: tirx.PrimFunc, scalars: tuple[str, ...], scratch: bool, teams: int = 0
) -> CudaKernel:
    """The CUDA text of a kernel that ``schedules.kernel.define`` made, or TVM of an operator.

    ``scratch``: whether the last of its buffers is; ``teams``: of a block of threads. Raises
    UnsupportedOpError where a kernel was made for another ISA.
    """
    loop, rounds, aliases = func.body, None, {}
    if FLAT not in func.attrs:
        outer = outer_loop(func)
        func, loop, rounds, aliases = outer.func, outer.loop, outer.rounds, outer.names
    assert isinstance(loop, tirx.For), func
    buffers = [p for p in func.params if isinstance(p.ty, tirx.BufferType)]
    written = {aliases.get(a.buffer, a.buffer) for a in accesses(loop.body) if a.stores}
    pointers = {b: b.name for b in buffers} | {alias: b.name for alias, b in aliases.items()}
    # What needs memory of its own is long, and unrolled where that gains: to unroll it once more,
    # NVIDIA's compiler would need more registers than there are.
    writer = _Writer(loop, pointers, func.params[len(buffers) : -2], unrolls=not scratch)
    body = writer.write()
    read = {aliases.get(a.buffer, a.buffer) for a in accesses(loop.body) if not a.stores}
    parameters = tuple(
        Parameter(b.name, C_TYPES[str(b.ty.dtype)], b in read, b in written) for b in buffers
    )
    takes = ", ".join(
        [*(f"{p.pointer}{p.name}" for p in parameters), *(f"int {s}" for s in AMBIENT_SCALARS)]
    )
    assert set(scalars) <= set(AMBIENT_SCALARS)
    text = "\n".join(
        [
            f"SLM_DEVICE void {name}(const slm_team t, const int block, {takes}) {{",
            *(f"  {line}" for line in body),
            "}",
            "",
        ]
    )
    own = scratch_bytes(buffers[-1]) if scratch else 0
    return CudaKernel(name, text, parameters, writer.shared_bytes, rounds, own, teams)


def scratch_bytes(buffer: Any) -> int:
    """One team's piece of scratch, aligned as the plan aligns it."""
    size = size_of(str(buffer.ty.dtype)) * int(buffer.ty.shape[0])
    return -(-size // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT


SCRATCH_ALIGNMENT = 64  # bytes


class _Writer:
    """Writes the statements of one block of the grid."""

    def __init__(self, loop: Any, pointers: dict[Any, str], scalars: Any, *, unrolls: bool) -> None:
        self._unrolls = unrolls
        self._lines: list[str] = []
        self._depth = 0
        self._count = 0
        self._loop = loop
        self._values = Values(self._load, self._address, self._name)
        self._hazards = Hazards()
        self._registers: dict[Any, dict[int, Value]] = {}
        self._arrays: dict[Any, _Array] = {}
        self._pointers = pointers
        self.shared_bytes = 0
        for scalar in scalars:
            self._values.bind(scalar, Value("int32", 1, (scalar.name,)))
        self._values.bind(loop.loop_var, Value("int32", 1, ("block",)))
        self._found: dict[Any, list[Access]] = {}
        for access in accesses(loop.body):
            self._found.setdefault(access.buffer, []).append(access)

    def write(self) -> list[str]:
        self._hazards.enter_loop(self._loop.body)  # a team's blocks follow one another
        self._forget_registers()
        self._statement(self._loop.body)
        return self._lines

    def _forget_registers(self) -> None:
        for seen in (self._hazards.read, self._hazards.written):
            seen.intersection_update(
                {b for b in seen if b in self._pointers or not _slots(self._found[b])}
            )

    def _emit(self, line: str) -> None:
        self._lines.append("  " * self._depth + line)

    @contextmanager
    def _indented(self, opening: str) -> Iterator[None]:
        self._emit(opening)
        self._depth += 1
        yield
        self._depth -= 1

    def _name(self, kind: str, text: str) -> str:
        self._count += 1
        self._emit(f"const {C_TYPES[kind]} v{self._count} = {text};")
        return f"v{self._count}"

    def _wait(self) -> None:
        self._emit("slm_sync(t);")

    def _statement(self, stmt: Any) -> None:
        if isinstance(stmt, tirx.SeqStmt):
            for one in stmt.seq:
                self._statement(one)
        elif isinstance(stmt, tirx.Bind):
            value = self._values.value(stmt.value)
            parts = tuple(self._name(value.kind, part) for part in value.parts)
            self._values.bind(stmt.var, Value(value.kind, value.lanes, parts))
        elif isinstance(stmt, tirx.BufferStore):
            self._store(stmt)
        elif isinstance(stmt, tirx.AllocBuffer):
            self._allocate(stmt.buffer)
        elif isinstance(stmt, tirx.For):
            self._for(stmt)
        elif isinstance(stmt, tirx.IfThenElse):
            self._if(stmt)
        elif isinstance(stmt, tirx.Evaluate):
            self._evaluate(stmt.value)
        else:
            raise unsupported(type(stmt).__name__)

    def _evaluate(self, call: Expr) -> None:
        # Prefetches are all that kernels call for their effect: a GPU has other threads to run.
        if isinstance(call, tirx.IntImm):
            return
        if str(call.op.name) != "tirx.call_llvm_intrin":
            raise unsupported(call.op.name)

    def _for(self, loop: Any) -> None:
        self._count += 1
        name = f"i{self._count}"
        first = self._values.scalar(loop.min)
        end = self._values.scalar(tirx.Add(loop.min, loop.extent))
        self._hazards.enter_loop(loop.body)
        self._forget_registers()
        before = self._hazards.copy()
        self._values.bind(loop.loop_var, Value("int32", 1, (name,)))
        if not self._unrolls:
            self._emit("#pragma unroll 1")
        with self._indented(f"for (int {name} = {first}; {name} < {end}; ++{name}) {{"):
            self._statement(loop.body)
        self._emit("}")
        self._hazards.join(before)

    def _if(self, stmt: Any) -> None:
        condition = self._values.scalar(stmt.condition)
        before = self._hazards.copy()
        with self._indented(f"if ({condition}) {{"):
            self._statement(stmt.then_case)
        after, self._hazards = self._hazards, before
        if stmt.else_case is not None:
            with self._indented("} else {"):
                self._statement(stmt.else_case)
        self._emit("}")
        self._hazards.join(after)

    def _allocate(self, buffer: Any) -> None:
        kind = str(buffer.ty.dtype)
        self._count += 1
        slots = _slots(self._found.get(buffer, []))
        if slots is not None:
            registers = {}
            for slot, lanes in slots.items():
                names = tuple(f"r{self._count}_{slot}_{i}" for i in range(parts_of(lanes)))
                self._emit(f"{C_TYPES[kind]} {', '.join(names)};")
                registers[slot] = Value(kind, lanes, names)
            self._registers[buffer] = registers
            return
        elements = 1
        for extent in buffer.ty.shape:
            elements *= int(extent)
        self._arrays[buffer] = _Array(self.shared_bytes)
        name = f"a{self._count}"
        self._pointers[buffer] = name
        self._emit(
            f"{C_TYPES[kind]} *const {name} = ({C_TYPES[kind]} *)(t.memory + {self.shared_bytes});"
        )
        self.shared_bytes += -(-elements * size_of(kind) // ALIGNMENT) * ALIGNMENT

    def _register(self, buffer: Any, index: Expr) -> Value | None:
        if buffer not in self._registers:
            return None
        base = _constant_base(index)
        assert base is not None, index
        return self._registers[buffer][base]

    def _load(self, load: Expr, kind: str, lanes: int) -> Value:
        """What a load reads, as elements of ``kind``."""
        (index,) = load.indices
        buffer, stored = load.source, str(load.source.ty.dtype)
        register = self._register(buffer, index)
        if register is not None:
            return register
        places = self._places(index, kind, lanes, size_of(stored))
        if self._hazards.before_load(buffer):
            self._wait()
        pointer = self._pointers[buffer]
        if kind != stored:
            pointer = f"((const {C_TYPES[kind]} *)(const void *)({pointer} + {places[0]}))"
            places = places[1:]
        return Value(kind, lanes, tuple(f"{pointer}[{p}]" for p in places))

    def _address(self, load: Expr) -> str:
        """The pointer to what a load of one lane would read, which is read from there on."""
        (index,) = load.indices
        place = self._values.scalar(index)
        if self._hazards.before_load(load.source):
            self._wait()
        return f"{self._pointers[load.source]} + {place}"

    def _places(self, index: Expr, kind: str, lanes: int, stored_size: int) -> list[str]:
        """Where the elements of a thread lie. Of those read as another kind, the first says from
        which element of the buffer on the others are counted."""
        given = type_of(index)[1]
        if given != lanes or stored_size != size_of(kind):
            if not isinstance(index, tirx.Ramp) or self._values.scalar(index.stride) != "1":
                raise unsupported(f"a load of {given} lanes as {lanes}")
            base = self._values.scalar(index.base)
            return [base, *(place(lanes, i) for i in range(parts_of(lanes)))]
        return list(self._values.value(index).parts)

    def _store(self, store: Any) -> None:
        (index,) = store.indices
        buffer, kind = store.buffer, str(store.buffer.ty.dtype)
        value = self._values.value(store.value)
        register = self._register(buffer, index)
        if register is not None:
            for name, part in zip(register.parts, value.parts, strict=True):
                self._emit(f"{name} = {part};")
            return
        places = self._values.value(index).parts
        parts = [self._name(kind, p) for p in value.parts]
        if self._hazards.before_store(buffer):
            self._wait()
        guard = f"if (t.lane < {value.lanes}) " if value.lanes < LANES else ""
        for at, part in zip(places, parts, strict=True):
            self._emit(f"{guard}{self._pointers[buffer]}[{at}] = {part};")


def _constant_base(index: Expr) -> int | None:
    base = index.base if isinstance(index, tirx.Ramp) else index
    if isinstance(index, tirx.Ramp) and not (
        isinstance(index.stride, tirx.IntImm) and int(index.stride.value) == 1
    ):
        return None
    return int(base.value) if isinstance(base, tirx.IntImm) else None


def _slots(found: list[Access]) -> dict[int, int] | None:
    """By the constant element that each access begins at, its lanes, where registers can hold
    them; else None."""
    slots: dict[int, int] = {}
    for access in found:
        base, lanes = _constant_base(access.index), type_of(access.index)[1]
        if base is None or (lanes not in (1, 2, 4, 8) and lanes % LANES):
            return None
        if slots.setdefault(base, lanes) != lanes:
            return None
    ends = sorted(slots.items())
    apart = all(a + lanes <= b for (a, lanes), (b, _) in pairwise(ends))
    return slots if apart else None
