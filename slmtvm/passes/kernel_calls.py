"""One function for each fused op: which kernels compute it, on which operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tvm import relax

from slmtvm.ir import ops
from slmtvm.ir.fused import padded_features
from slmtvm.schedules import rows

if TYPE_CHECKING:
    from slmtvm.passes.lower_kernels import KernelEmitter

Handler = Callable[[relax.Call, "KernelEmitter"], relax.Expr]
HANDLERS: dict[str, Handler] = {}


def _handles(name: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS[name] = handler
        return handler

    return register


def _shape(expr: relax.Expr) -> tuple[int, ...]:
    return tuple(int(d) for d in expr.ty.shape.values)


@_handles("slm.row")
def _row(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    x, *params = call.args
    m, width = _shape(x)
    attrs = call.attrs
    prologue, epilogue = str(attrs["prologue"]), str(attrs["epilogue"])
    op = rows.RowOp(
        prologue=prologue,
        epilogue=epilogue,
        m=m,
        d=width // 2 if prologue == "silu_glu" else width,
        eps=float(attrs["eps"]),
        group_size=int(attrs["group_size"]),
        storage=emitter.isa.row_dtype,
        keep_f32=bool(int(attrs["keep_float"])),
    )
    assert epilogue == "f32" or op.k_padded == padded_features(op.d, epilogue, op.group_size)
    operands = [emitter.weight(p.name, emitter.array(p)) for p in params]
    results = emitter.call(rows.build(op), [x, *operands])
    if epilogue == "f32":
        return results["y"]
    third = "xsum" if epilogue == "block" else "xz"
    fields = ["xq", "xs", third] + (["y"] if op.keep_f32 else [])
    return relax.Tuple([results[name] for name in fields])
