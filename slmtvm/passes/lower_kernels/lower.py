"""Fused ops -> calls of kernels; weights into the layout that the target's kernels read."""

from __future__ import annotations

import tvm
from tvm import relax

from slmtvm.ir import fused, ops
from slmtvm.ir.lowered import LoweredModel, SparseLayer
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.lower_kernels.emitter import KernelEmitter, NotBySessionError, is_of_sessions
from slmtvm.passes.lower_kernels.handlers import BY_SESSION, HANDLERS
from slmtvm.passes.lower_kernels.sparse import choose_sparse
from slmtvm.passes.rewrite import bindings, function_names
from slmtvm.schedules import attention, isa
from slmtvm.schedules.kernel import each_written_once
from slmtvm.schedules.templates import KnobChoice, default_choice
from slmtvm.target import Target

KEPT = ("window", "all")
"""What the cache of a layer with a window can hold: what it may still see, or all positions."""


def _lower_all(
    module: tvm.IRModule, emitter: KernelEmitter, *, of_sessions: bool
) -> dict[str, relax.Function]:
    """The functions lowered; those of several sessions, which no GPU runs, left out where one
    cannot be."""
    names = function_names(module)
    functions = {n: emitter.lower(module[n]) for n in names if not is_of_sessions(n)}
    if not of_sessions:
        return functions
    try:
        return functions | {n: emitter.lower(module[n]) for n in names if is_of_sessions(n)}
    except NotBySessionError:
        return functions


def lower_kernels(
    model: CanonicalModel,
    target: Target,
    kv_dtype: str | None = None,
    choose: KnobChoice = default_choice,
    sparse: str = "auto",
    keep: str = "window",
) -> LoweredModel:
    """Every op as a call of a kernel of ours, or of a PrimFunc of TVM's where we have none.

    kv_dtype: "float32", "float16", "int8" or "int4", how the KV cache holds its values; None is
    what suits the ISA. choose: the knobs of each kernel that has any; they change how fast it is,
    and no bit.
    sparse: one of SPARSE, whether layers whose weights are sparse skip zeros where that is faster.
    keep: one of KEPT, the positions that the cache of a layer with a window holds.
    """
    capacity = attention.capacity_of(model.context)
    primitives = isa.get(target.isa)
    calls = [
        binding.value
        for name in function_names(model.module)
        for binding in bindings(model.module[name])
        if isinstance(binding.value, relax.Call)
    ]
    linears = [c for c in calls if c.op in (fused.FLOAT_LINEAR, fused.QUANTIZED_LINEAR)]
    kv_dtype = kv_dtype or primitives.kv_dtype
    emitter = KernelEmitter(
        model, primitives, capacity, kv_dtype, linears, HANDLERS, BY_SESSION, choose
    )
    if keep == "window" and model.kind != "encoder":
        bodies = [n for n in function_names(model.module) if n.startswith("body_")]
        emitter.step_rows = max(int(n.split("_")[1]) for n in bodies)
    chosen: tuple[SparseLayer, ...] = ()
    if sparse != "off":
        chosen = choose_sparse(emitter, [c for c in calls if c.op == ops.EMBEDDING], sparse)
    with each_written_once():
        functions = _lower_all(model.module, emitter, of_sessions=target.cuda is None)
    with target.tvm:
        module = relax.transform.LegalizeOps()(tvm.IRModule(functions))
    return LoweredModel(
        module,
        emitter.kernels,
        emitter.used_weights(module),
        emitter.state,
        capacity,
        model,
        chosen,
        emitter.rings,
        emitter.seek_reach,
        calls_join=target.cuda is not None,
    )
