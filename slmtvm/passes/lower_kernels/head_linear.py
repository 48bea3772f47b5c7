"""Small matrices of heads."""

from __future__ import annotations

from tvm import relax

from slmtvm.ir import ops
from slmtvm.passes.lower_kernels.emitter import KernelEmitter
from slmtvm.passes.lower_kernels.registry import handles, shape_of
from slmtvm.schedules.head_linear import HeadLinearShape, build_head_linear


@handles("slm.head_linear")
def _head_linear(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    x, named = call.args[0], ops.operands(call)
    groups, k, n = shape_of(named["weight"])
    shape = HeadLinearShape(
        shape_of(x)[0], int(call.attrs["num_heads"]), groups, k, n, has_bias="bias" in named
    )
    weights = [emitter.weight(e.name, emitter.array(e)) for e in named.values()]
    return emitter.call(build_head_linear(shape), [x, *weights])["y"]
