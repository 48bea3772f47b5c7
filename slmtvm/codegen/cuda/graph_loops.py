"""Loops that TVM makes of a graph's operators: rounds of the outermost as blocks of a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx

from slmtvm.codegen.cuda.hazards import accesses, operands
from slmtvm.codegen.cuda.values import unsupported
from slmtvm.codegen.objects import TVM_KERNELS


@dataclass(frozen=True)
class OuterLoop:
    """A loop whose ``rounds`` need nothing of one another, alone in ``func``; ``names`` says which
    of its parameters each buffer of the loop is."""

    func: tirx.PrimFunc
    loop: tirx.For
    rounds: int
    names: dict[Any, Any]


def outer_loop(func: tirx.PrimFunc) -> OuterLoop:
    """The loop that a function of TVM's consists of.

    Raises UnsupportedOpError where there are several, or one whose rounds write to the same place.
    """
    target = tvm.target.Target({"kind": "llvm"})
    with target:
        passes = tvm.ir.transform.Sequential([tirx.transform.BindTarget(target), *TVM_KERNELS])
        flat = passes(tvm.IRModule({"main": func}))["main"]
    found = list(flat.body.seq) if isinstance(flat.body, tirx.SeqStmt) else [flat.body]
    loops = [stmt for stmt in found if not isinstance(stmt, tirx.DeclBuffer)]
    names = {s.buffer: s.data.args[0] for s in found if isinstance(s, tirx.DeclBuffer)}
    if len(loops) != 1 or not isinstance(loops[0], tirx.For):
        raise unsupported("more than one loop that TVM made of a graph's operator")
    (loop,) = loops
    for access in accesses(loop.body):
        if access.buffer not in names or (access.stores and not _uses(access.index, loop.loop_var)):
            raise unsupported("loops that TVM made of a graph's operator, one round after another")
    return OuterLoop(flat, loop, int(loop.extent.value), names)


def _uses(expr: Any, var: Any) -> bool:
    return bool(expr.same_as(var)) or any(_uses(part, var) for part in operands(expr))
