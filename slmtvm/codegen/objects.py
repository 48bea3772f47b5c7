"""Kernels to one relocatable object: TIR, lowered without TVM's packed calling convention.

Each kernel becomes a plain C function ``void name(void *buffer..., int32_t scalar..., int32_t
begin, int32_t end)`` that needs nothing but libm.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.ir import PointerType, PrimType
from tvm.tirx import transform as tir

from slmtvm.errors import SlmError
from slmtvm.schedules.kernel import FLAT
from slmtvm.target import Target

_LARGEST_OBJECT = 64 << 20  # bytes: several times those of the largest models


def lower_to_pointers(func: tirx.PrimFunc, name: str) -> tirx.PrimFunc:
    """``func(A: T.Buffer, ..., s: int32)`` -> ``name(A_ptr: T.handle, ..., s: int32)``."""
    params: list[tirx.Var] = []
    declarations: list[tirx.Stmt] = []
    for param in func.params:
        if isinstance(param.ty, tirx.BufferType):
            pointer = tirx.Var(f"{param.name}_ptr", PointerType(PrimType(str(param.ty.dtype))))
            params.append(pointer)
            declarations.append(tirx.DeclBuffer(param, data=pointer))
        else:
            params.append(param)
    body = tirx.SeqStmt([*declarations, func.body])
    return tirx.PrimFunc(params, body, func.ret_type, func.attrs).with_attr("global_symbol", name)


# A kernel made by ``schedules.kernel.define`` is flat and vectorised as it is written. On its long
# straight-line code TVM's simplifiers would take most of the compile time and change nothing.
# FlattenBuffer must not run without them: it turns a constant index into ``Broadcast(0) + Ramp``,
# which the code generator reads and writes lane by lane.
_FLAT_KERNELS = (tir.LowerIntrin(),)
# What LegalizeOps makes: TVM's default lowering, without the packed API.
TVM_KERNELS = (
    tvm.s_tir.transform.CanonicalizeLoop(),
    tvm.s_tir.transform.LowerInitBlock(),
    tvm.s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
    tvm.s_tir.transform.ConvertBlocksToOpaque(),
    tvm.s_tir.transform.CompactBufferAllocation(),
    tvm.s_tir.transform.LowerMatchBuffer(),
    tvm.s_tir.transform.LowerOpaqueBlock(),
    tir.StmtSimplify(),
    tir.FlattenBuffer(),
    tir.NarrowDataType(32),
    tir.VectorizeLoop(True),
    tir.UnrollLoop(),
    tir.StmtSimplify(),
    tir.RemoveNoOp(),
    tir.LowerIntrin(),
)


def _lower(kernels: Mapping[str, tirx.PrimFunc], target: Target, passes: Sequence[Any]) -> Any:
    module = tvm.IRModule({n: lower_to_pointers(f, n) for n, f in kernels.items()})
    return tvm.ir.transform.Sequential([tir.BindTarget(target.tvm), *passes])(module)


def build_module(kernels: Mapping[str, tirx.PrimFunc], target: Target) -> Any:
    """The kernels compiled by LLVM: a TVM module that can be written or inspected."""
    flat = {n: f for n, f in kernels.items() if FLAT in f.attrs}
    others = {n: f for n, f in kernels.items() if n not in flat}
    with target.tvm:
        module = _lower(flat, target, _FLAT_KERNELS)
        module.update(_lower(others, target, TVM_KERNELS))
        return tvm.get_global_func("target.build.llvm")(module, target.tvm)


def write_object(kernels: Mapping[str, tirx.PrimFunc], target: Target, path: Path) -> None:
    """Compile ``kernels`` (name -> PrimFunc) for ``target`` into the object file ``path``.

    Raises OSError where ``path`` cannot be written, SlmError where files may not be large enough.
    """
    path.write_bytes(object_bytes(kernels, target))


def object_bytes(kernels: Mapping[str, tirx.PrimFunc], target: Target) -> bytes:
    """The object file of ``kernels``; raises SlmError as ``write_object`` does."""
    return _bytes_of(build_module(kernels, target))


def _bytes_of(module: Any) -> bytes:
    """The object of a compiled module.

    LLVM ends the whole process where a write fails, so that it gets a file in memory, where only
    the limit of this process can make it fail.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and limit < _LARGEST_OBJECT:
        raise SlmError(
            f"this process may write files of {limit:,} bytes at most (ulimit -f), code generation "
            f"needs {_LARGEST_OBJECT:,}; raise the limit"
        )
    with os.fdopen(os.memfd_create("kernels"), "rb") as file:
        module.write_to_file(f"/proc/self/fd/{file.fileno()}", "o")
        return file.read()
