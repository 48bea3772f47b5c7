"""Rows of a table by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import relax

from slmtvm.ir import ops
from slmtvm.passes.kernel_calls.registry import handles, shape_of
from slmtvm.schedules import embedding

if TYPE_CHECKING:
    from slmtvm.passes.lower_kernels import KernelEmitter


@handles("slm.embedding")
def _embedding(call: relax.Call, emitter: KernelEmitter) -> relax.Expr:
    attrs, named = call.attrs, ops.operands(call)
    arrays = {name: emitter.array(expr) for name, expr in named.items()}
    op = embedding.EmbeddingOp(
        m=shape_of(call.args[0])[0],
        vocab=len(arrays["table"]),
        dim=int(attrs["dim"]),
        format=str(attrs["format"]),
        table_dtype=str(arrays["table"].dtype) if str(attrs["format"]) == "int8" else "int8",
        scale_shape=arrays["scales"].shape if "scales" in arrays else (),
        zero_points="zero_points" in arrays,
        group_size=int(attrs["group_size"]),
    )
    operands = [emitter.weight(expr.name, arrays[name]) for name, expr in named.items()]
    return emitter.call(embedding.build(op), [call.args[0], *operands])["y"]
