"""How often each part of a kernel is run, and where that part is in its assembly.

Parts of a kernel's TIR are marked with empty inline assembly, which leaves a comment wherever the
compiler puts the part. A loop that it unrolled by four holds the mark of its body four times, and
goes round a fourth as often; one that it unrolled wholly leaves its marks in what is around.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.ir import StringImm

from slmtvm.codegen.cuda.hazards import accesses
from slmtvm.schedules.kernel import Kernel

WEIGHTS = ("weight", "scales", "zero_points")
"""Tensors that every call reads from memory, and most but once."""
UNKNOWN_ROUNDS = 64
"""Of loops whose rounds the code does not say, such as those over positions."""
_MARK = "slm_mark"
_SEEN = re.compile(rf"{_MARK} (\d+)\b")
_LABEL = re.compile(r"(\.LBB\w+):")
_INSTRUCTION = re.compile(r"\s+[a-z][\w.]*(\s.*)?")
_BRANCH = re.compile(r"\s+(j\w+|b|b\.\w+|cbn?z|tbn?z|b\w+)\b(?:.*[\s,])?(\.LBB\w+)\s*$")

_OPERATIONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "FloorDiv": operator.floordiv,
    "FloorMod": operator.mod, "Min": np.minimum, "Max": np.maximum, "LT": operator.lt,
    "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq,
    "NE": operator.ne, "And": np.logical_and, "Or": np.logical_or,
}  # fmt: skip


@dataclass(frozen=True)
class Marked:
    """A kernel with marks: ``runs[i]`` is how often what bears mark i is run in a whole call, and
    ``streamed[i]`` how many bytes of weights it reads that nothing has read before."""

    func: tirx.PrimFunc
    runs: tuple[float, ...]
    streamed: tuple[float, ...]


@dataclass(frozen=True)
class Block:
    """Instructions that are run one after the other, ``count`` times in a whole call, and the bytes
    of weights that these times bring from memory."""

    instructions: tuple[str, ...]
    count: float
    streamed: float = 0.0


def marked(kernel: Kernel, comment: str) -> Marked:
    """``kernel`` with a mark at the beginning of every body, and behind what has one.

    comment: what begins one in the assembly of the target.
    """
    marker = _Marker(kernel)
    body = marker.visit(kernel.func.body)
    text = "".join(
        f"define void @{_MARK}_{i}() alwaysinline {{\n"
        f'  call void asm sideeffect "{comment} {_MARK} {i}", ""()\n  ret void\n}}\n'
        for i in range(len(marker.runs))
    )
    zero = tirx.IntImm("int32", 0)
    body = tirx.AttrStmt(zero, "pragma_import_llvm", StringImm(text), body)
    return Marked(kernel.func.with_body(body), tuple(marker.runs), marker.streamed())


class _Marker:
    """Walks a kernel with, for each block of its grid, how often a statement is run in it."""

    def __init__(self, kernel: Kernel) -> None:
        self.runs: list[float] = []
        self._known: dict[Any, Any] = {}
        self._blocks = np.arange(kernel.grid)
        self._inside = False  # of the loop over the grid
        self._tensors = {
            parameter: tensor
            for parameter, tensor in zip(kernel.func.params, kernel.tensors, strict=False)
            if tensor.name in WEIGHTS
        }
        self._loads: dict[str, dict[int, float]] = {t.name: {} for t in self._tensors.values()}

    def streamed(self) -> tuple[float, ...]:
        """By mark. Each byte of a weight comes from memory once, with whatever reads it: those that
        read more of a tensor count for more of it."""
        found = [0.0] * len(self.runs)
        for tensor in self._tensors.values():
            loads = self._loads[tensor.name]
            size = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
            for mark, count in loads.items():
                found[mark] += size * count / max(sum(loads.values()), 1)
        return tuple(found)

    def visit(self, stmt: Any, each: Any = None) -> Any:
        each = np.ones(len(self._blocks)) if each is None else each
        if isinstance(stmt, tirx.SeqStmt):
            done: list[Any] = []
            for at, inner in enumerate(stmt.seq):
                done.append(self.visit(inner, each))
                branches = isinstance(inner, (tirx.For, tirx.IfThenElse))
                if self._inside and branches and at + 1 < len(stmt.seq):
                    done.append(self._mark(each))
            return tirx.SeqStmt(done)
        if isinstance(stmt, tirx.Bind):
            self._known[stmt.var] = self._value(stmt.value)
        if isinstance(stmt, tirx.AttrStmt):
            return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, self.visit(stmt.body, each))
        if isinstance(stmt, tirx.For):
            return self._loop(stmt, each)
        if isinstance(stmt, tirx.IfThenElse):
            given = self._value(stmt.condition)
            part = 0.5 if given is None else np.asarray(given, float)
            other = stmt.else_case
            return tirx.IfThenElse(
                stmt.condition,
                self._begin(stmt.then_case, each * part),
                None if other is None else self._begin(other, each * (1 - part)),
            )
        for access in accesses(stmt):
            if not access.stores and access.buffer in self._tensors and self.runs:
                loads, now = self._loads[self._tensors[access.buffer].name], len(self.runs) - 1
                loads[now] = loads.get(now, 0.0) + float(np.sum(each))
        return stmt

    def _loop(self, stmt: Any, each: Any) -> Any:
        outer, self._inside = not self._inside, True
        rounds: Any = 1.0
        if outer:
            self._known[stmt.loop_var] = self._blocks
        else:
            extent = self._value(stmt.extent)
            rounds = UNKNOWN_ROUNDS if extent is None else np.asarray(extent, float)
        body = self._begin(stmt.body, each * rounds)
        self._inside = not outer
        return tirx.For(
            stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, stmt.thread_binding,
            stmt.annotations, stmt.step,
        )  # fmt: skip

    def _begin(self, stmt: Any, each: Any) -> Any:
        mark = self._mark(each)
        return tirx.SeqStmt([mark, self.visit(stmt, each)])

    def _mark(self, each: Any) -> Any:
        self.runs.append(float(np.sum(each)))
        return tirx.Evaluate(tirx.call_extern("void", f"{_MARK}_{len(self.runs) - 1}"))

    def _value(self, expr: Any) -> Any:
        """For each block of the grid, or for all; None where it is not known."""
        if isinstance(expr, tirx.IntImm):
            return int(expr.value)
        if isinstance(expr, tirx.Var):
            return self._known.get(expr)
        if isinstance(expr, tirx.Cast):
            return self._value(expr.value)
        operation = _OPERATIONS.get(type(expr).__name__)
        if operation is None:
            return None
        a, b = self._value(expr.a), self._value(expr.b)
        return None if a is None or b is None else operation(a, b)


def blocks(
    lines: Sequence[str], runs: Sequence[float], streamed: Sequence[float] = ()
) -> list[Block]:  # fmt: skip
    """The basic blocks of a function's assembly with how often they are run; ``runs`` and
    ``streamed`` as ``Marked`` has them.

    A block without a mark is run as often as the loop that it is in goes round.
    """
    parts = _parts(lines)
    seen = [[int(m) for m in _SEEN.findall("\n".join(part.lines))] for part in parts]
    places: dict[int, int] = {}
    for marks in seen:
        for mark in marks:
            places[mark] = places.get(mark, 0) + 1
    counts = [
        min((runs[m] / places[m] for m in marks), default=None) for marks in seen
    ]  # fmt: skip
    loops = _loops(parts)
    found = []
    for at, part in enumerate(parts):
        count = counts[at]
        if count is None:
            count = _around(at, loops, counts)
        instructions = tuple(
            line.strip() for line in part.lines if _INSTRUCTION.fullmatch(line)
        )  # fmt: skip
        if instructions:
            bytes_read = sum(streamed[m] / places[m] for m in seen[at]) if streamed else 0.0
            found.append(Block(instructions, count, bytes_read))
    return found


@dataclass
class _Part:
    labels: list[str]
    lines: list[str]
    target: str | None = None


def _parts(lines: Sequence[str]) -> list[_Part]:
    """``lines`` cut before labels and behind branches."""
    parts = [_Part([], [])]
    for line in lines:
        if label := _LABEL.match(line):
            if parts[-1].lines or parts[-1].target:
                parts.append(_Part([], []))
            parts[-1].labels.append(label[1])
            continue
        parts[-1].lines.append(line)
        if branch := _BRANCH.fullmatch(line):
            parts[-1].target = branch[2]
            parts.append(_Part([], []))
    return parts


def _loops(parts: Sequence[_Part]) -> list[tuple[int, int]]:
    """First and last parts of loops, the innermost first."""
    at = {label: i for i, part in enumerate(parts) for label in part.labels}
    found = {
        (at[part.target], i)
        for i, part in enumerate(parts)
        if part.target is not None and at.get(part.target, i + 1) <= i
    }
    return sorted(found, key=lambda loop: loop[1] - loop[0])


def _around(
    at: int, loops: Sequence[tuple[int, int]], counts: Sequence[float | None]
) -> float:  # fmt: skip
    """How often the innermost loop around a part goes round, as the marks in it say."""
    for n, (first, last) in enumerate(loops):
        if not first <= at <= last:
            continue
        inner = [loop for loop in loops[:n] if first <= loop[0] and loop[1] <= last]
        own = [
            count
            for i in range(first, last + 1)
            if (count := counts[i]) is not None and not any(a <= i <= b for a, b in inner)
        ]
        if own:
            return max(own)
    return 1.0
