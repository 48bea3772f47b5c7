"""Where the threads of a team must wait for one another, to see what they wrote to memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx
from tvm.ir import Call, TensorLoad

Stmt = Any
Buffer = Any


def children(stmt: Stmt) -> Iterator[Stmt]:
    """The statements within a statement."""
    if isinstance(stmt, tirx.SeqStmt):
        yield from stmt.seq
    elif isinstance(stmt, (tirx.For, tirx.AttrStmt)):
        yield stmt.body
    elif isinstance(stmt, tirx.IfThenElse):
        yield stmt.then_case
        if stmt.else_case is not None:
            yield stmt.else_case


def operands(node: Any) -> Iterator[Any]:
    """The expressions that a statement or an expression consists of."""
    if isinstance(node, tirx.Bind):
        yield node.value
    elif isinstance(node, tirx.BufferStore):
        yield node.value
        yield from node.indices
    elif isinstance(node, TensorLoad):
        yield from node.indices
    elif isinstance(node, tirx.Evaluate):
        yield node.value
    elif isinstance(node, tirx.For):
        yield from (node.min, node.extent)
    elif isinstance(node, tirx.IfThenElse):
        yield node.condition
    elif isinstance(node, Call):
        yield from node.args
    elif isinstance(node, tirx.Select):
        yield from (node.condition, node.true_value, node.false_value)
    elif isinstance(node, tirx.Shuffle):
        yield from node.vectors
    elif isinstance(node, tirx.Ramp):
        yield from (node.base, node.stride)
    elif isinstance(node, (tirx.Broadcast, tirx.Cast)):
        yield node.value
    elif hasattr(node, "a"):
        yield node.a
        if hasattr(node, "b"):
            yield node.b


@dataclass(frozen=True)
class Access:
    """A load or a store of a buffer."""

    buffer: Buffer
    index: Any
    stores: bool


def accesses(stmt: Stmt) -> Iterator[Access]:
    """Every load and store within a statement."""
    waiting = [stmt]
    while waiting:
        node = waiting.pop()
        if isinstance(node, TensorLoad):
            yield Access(node.source, node.indices[0], False)
        elif isinstance(node, tirx.BufferStore):
            yield Access(node.buffer, node.indices[0], True)
        waiting.extend(operands(node))
        waiting.extend(children(node))


@dataclass
class Hazards:
    """What a team's threads read and wrote since they last waited for one another.

    A thread may run ahead of others until then: what it reads must not be what another has yet to
    write, and what it writes not what another has yet to read or to write over.
    """

    read: set[Buffer] = field(default_factory=set)
    written: set[Buffer] = field(default_factory=set)

    def before_load(self, buffer: Buffer) -> bool:
        """Notes a load; whether the team must wait first."""
        wait = buffer in self.written
        if wait:
            self.clear()
        self.read.add(buffer)
        return wait

    def before_store(self, buffer: Buffer) -> bool:
        """Notes a store; whether the team must wait first."""
        wait = buffer in self.written or buffer in self.read
        if wait:
            self.clear()
        self.written.add(buffer)
        return wait

    def clear(self) -> None:
        """The team has waited."""
        self.read.clear()
        self.written.clear()

    def copy(self) -> Hazards:
        return Hazards(set(self.read), set(self.written))

    def join(self, other: Hazards) -> None:
        """Either may have happened."""
        self.read |= other.read
        self.written |= other.written

    def enter_loop(self, body: Stmt) -> None:
        """Any of ``body`` may have happened, in an earlier round."""
        for access in accesses(body):
            (self.written if access.stores else self.read).add(access.buffer)
