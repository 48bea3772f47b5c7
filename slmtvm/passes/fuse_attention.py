"""rope(linear q), rope(linear k), linear v, attention -> one linear, one qkv_attention."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax

from slmtvm.errors import UnsupportedOpError
from slmtvm.ir import fused, ops
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.merge_linears import merge_linears
from slmtvm.passes.rewrite import Rewriter, rewrite


@dataclass(frozen=True)
class FuseAttention:
    """Attention takes its projections from one row [q | k | v] and rotates them itself."""

    name = "fuse-attention"

    def apply(self, model: CanonicalModel) -> CanonicalModel:
        return rewrite(model, _rule)


def _rule(call: relax.Call, rewriter: Rewriter) -> relax.Expr | None:
    if call.op == ops.REMEMBER:
        x, k, v = call.args
        kv = merge_linears([k, v], rewriter)
        if kv is None:
            kv = rewriter.emit(relax.op.concat([k, v], axis=1))
        return fused.remember_rows(x, kv, call)
    if call.op != ops.ATTENTION:
        return None
    q, k, v = call.args[:3]
    if int(call.attrs["window"]) or float(call.attrs["softcap"]) or str(call.attrs["operands"]):
        raise UnsupportedOpError(
            "attention with a window, a cap on its scores or a bias has no kernel",
            where=f"attention layer {int(call.attrs['layer'])}",
        )
    q_rope, k_rope = rewriter.call_to(q, ops.ROPE), rewriter.call_to(k, ops.ROPE)
    cos = sin = None
    interleaved = False
    if q_rope is not None or k_rope is not None:
        if q_rope is None or k_rope is None or not _same_tables(q_rope, k_rope):
            raise UnsupportedOpError(
                "queries and keys are rotated differently; both must use the same tables",
                where=f"attention layer {int(call.attrs['layer'])}",
            )
        _, cos, sin = q_rope.args
        interleaved = bool(int(q_rope.attrs["interleaved"]))
        q, k = q_rope.args[0], k_rope.args[0]
    qkv = merge_linears([q, k, v], rewriter)
    if qkv is None:
        qkv = rewriter.emit(relax.op.concat([q, k, v], axis=1))
    return fused.qkv_attention(qkv, cos, sin, call, interleaved=interleaved)


def _same_tables(a: relax.Call, b: relax.Call) -> bool:
    return (
        a.args[1].same_as(b.args[1])
        and a.args[2].same_as(b.args[2])
        and a.attrs["interleaved"] == b.attrs["interleaved"]
    )
