"""add(x, linear(y)) -> linear(y) with x added as it is written."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax
from tvm.ir import Op

from slmtvm.ir import fused, ops
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.rewrite import Rewriter, rewrite


@dataclass(frozen=True)
class FuseResidual:
    """The add goes into the linear layer where nothing else reads that layer's result."""

    name = "fuse-residual"

    def apply(self, model: CanonicalModel) -> CanonicalModel:
        return rewrite(model, _rule)


def _rule(call: relax.Call, rewriter: Rewriter) -> relax.Expr | None:
    if not isinstance(call.op, Op) or call.op.name != "relax.add":
        return None
    for value, other in (list(call.args)[::-1], list(call.args)):
        for op in (fused.QUANTIZED_LINEAR, fused.FLOAT_LINEAR):
            linear = rewriter.call_to(value, op)
            if linear is None or len(rewriter.readers(value)) != 1:
                continue
            named = ops.operands(linear)
            if "residual" in named or not _is_rows(other, int(linear.attrs["n"])):
                continue
            inputs = list(linear.args)[: int(linear.attrs["inputs"])]
            return fused.linear_on(
                inputs, linear, {**named, "residual": other}, op, str(linear.attrs["activation"])
            )
    return None


def _is_rows(expr: relax.Expr, features: int) -> bool:
    """Whether this has a row of so many features for each token: it is no number and no vector."""
    dims = expr.ty.shape.values
    return len(dims) == 2 and bool(dims[1] == features)
