"""linear c * causal_conv(linear b * linear v) -> one linear, one convolution with its gates."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax
from tvm.ir import Op

from slmtvm.ir import fused, ops
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.merge_linears import merge_linears
from slmtvm.passes.rewrite import Rewriter, rewrite


@dataclass(frozen=True)
class FuseConvolution:
    """A convolution whose input and output are gated takes all three from one row [b | c | v]."""

    name = "fuse-convolution"

    def apply(self, model: CanonicalModel) -> CanonicalModel:
        return rewrite(model, _rule)


def _rule(call: relax.Call, rewriter: Rewriter) -> relax.Expr | None:
    if call.op == ops.CAUSAL_CONV:
        gated = len(rewriter.now_read_by) == 1 and _product(rewriter.now_read_by[0]) is not None
        # Where it cannot be fused with its gates after all, _rule sees it again below.
        return None if gated else fused.short_conv(call.args[0], call, gated=False)
    factors = _product(call)
    if factors is None:
        return None
    for gate, value in (factors, factors[::-1]):
        conv = rewriter.call_to(value, ops.CAUSAL_CONV)
        if conv is None:
            continue
        inner = _product(rewriter.definition(conv.args[0]))
        merged = None if inner is None else merge_linears([inner[0], gate, inner[1]], rewriter)
        if merged is not None:
            return fused.short_conv(merged, conv, gated=True)
        plain = rewriter.emit(fused.short_conv(conv.args[0], conv, gated=False))
        return relax.op.multiply(gate, plain)
    return None


def _product(expr: relax.Expr | None) -> list[relax.Expr] | None:
    """The factors of an elementwise product of two values of one shape."""
    if not isinstance(expr, relax.Call) or not isinstance(expr.op, Op):
        return None
    if expr.op.name != "relax.multiply":
        return None
    a, b = expr.args
    ranks = [len(x.ty.shape.values) if isinstance(x.ty, relax.TensorType) else 0 for x in (a, b)]
    same = ranks == [2, 2] and int(a.ty.shape[1]) == int(b.ty.shape[1])
    return [a, b] if same else None
