"""Fused ops -> calls of kernels; weights into the layout that the target's kernels read."""

from __future__ import annotations

import tvm
from tvm import relax

from slmtvm.ir import fused
from slmtvm.ir.lowered import LoweredModel
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.lower_kernels.emitter import KernelEmitter
from slmtvm.passes.lower_kernels.handlers import HANDLERS
from slmtvm.passes.rewrite import bindings, function_names
from slmtvm.schedules import attention, isa
from slmtvm.schedules.templates import KnobChoice, default_choice
from slmtvm.target import Target


def lower_kernels(
    model: CanonicalModel,
    target: Target,
    kv_dtype: str | None = None,
    choose: KnobChoice = default_choice,
) -> LoweredModel:
    """Every op as a call of a kernel of ours, or of a PrimFunc of TVM's where we have none.

    kv_dtype: "float32", "float16" or "int8", how the KV cache holds its values; None is what suits
    the ISA. choose: the knobs of each kernel that has any; they change how fast it is, and no bit.
    """
    capacity = attention.capacity_of(model.context)
    primitives = isa.get(target.isa)
    linears = [
        binding.value
        for name in function_names(model.module)
        for binding in bindings(model.module[name])
        if isinstance(binding.value, relax.Call)
        and binding.value.op in (fused.FLOAT_LINEAR, fused.QUANTIZED_LINEAR)
    ]
    kv_dtype = kv_dtype or primitives.kv_dtype
    emitter = KernelEmitter(model, primitives, capacity, kv_dtype, linears, HANDLERS, choose)
    functions = {name: emitter.lower(model.module[name]) for name in function_names(model.module)}
    with target.tvm:
        module = relax.transform.LegalizeOps()(tvm.IRModule(functions))
    return LoweredModel(
        module, emitter.kernels, emitter.used_weights(module), emitter.state, capacity, model
    )
