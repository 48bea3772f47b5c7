"""Sums and products of rows."""

from __future__ import annotations

from tvm import relax

from slmtvm.passes.lower_kernels.emitter import KernelEmitter
from slmtvm.passes.lower_kernels.registry import handles, shape_of
from slmtvm.schedules import elementwise


@handles("relax.add")
def _add(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    a, b = call.args
    if shape_of(a) != shape_of(b) or len(shape_of(a)) != 2:
        return call
    return emitter.call(elementwise.build_add(*shape_of(a)), [a, b])["y"]


@handles("relax.multiply")
def _multiply(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    for a, b in (list(call.args), list(call.args)[::-1]):
        if len(shape_of(a)) == len(shape_of(b)) == 2 and shape_of(b) in (
            shape_of(a),
            (shape_of(a)[0], 1),
        ):
            kernel = elementwise.build_multiply(shape_of(a)[0], shape_of(a)[1], shape_of(b)[1])
            return emitter.call(kernel, [a, b])["y"]
    return call
