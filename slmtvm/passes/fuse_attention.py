"""rope(norm(linear q)), rope(norm(linear k)), linear v, attention -> a linear, a qkv_attention.

Each of the three may be followed by a ``slm.head_linear``.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax

from slmtvm.ir import fused, ops
from slmtvm.ir.fused import HeadNorms, Turn
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.merge_linears import merge_linears
from slmtvm.passes.rewrite import Rewriter, rewrite


@dataclass(frozen=True)
class FuseAttention:
    """Attention takes its projections from one row [q | k | v], norms and rotates them itself.

    What it cannot take, such as different rotations or a norm after them, is left where it is; the
    projections then come apart.
    """

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
    q, k, v, bases = _take_bases(list(call.args[:3]), rewriter)
    q, k, turn = _take_rotation(q, k, rewriter)
    q, q_gamma, q_eps = _take_norm(q, int(call.attrs["num_heads"]), rewriter)
    k, k_gamma, k_eps = _take_norm(k, int(call.attrs["num_kv_heads"]), rewriter)
    merged = merge_linears([q, k, v], rewriter)
    projections = [q, k, v] if merged is None else [merged]
    norms = HeadNorms(q_gamma, k_gamma, q_eps, k_eps)
    return fused.qkv_attention(projections, norms, turn, call, bases)


def _take_bases(
    heads: list[relax.Expr], rewriter: Rewriter
) -> tuple[relax.Expr, relax.Expr, relax.Expr, list[relax.Expr]]:
    """Queries, keys and values before their projections, with these, where all three have one."""
    calls = [rewriter.call_to(x, ops.HEAD_LINEAR) for x in heads]
    given = [call for call in calls if call is not None and "bias" not in ops.operands(call)]
    if len(given) == len(heads) and len({str(c.args[1].ty.shape) for c in given}) == 1:
        q, k, v = (call.args[0] for call in given)
        return q, k, v, [call.args[1] for call in given]
    q, k, v = heads
    return q, k, v, []


def _take_rotation(
    q: relax.Expr, k: relax.Expr, rewriter: Rewriter
) -> tuple[relax.Expr, relax.Expr, Turn]:
    """q and k before their rotation, where both have the same."""
    q_rope, k_rope = rewriter.call_to(q, ops.ROPE), rewriter.call_to(k, ops.ROPE)
    if q_rope is None or k_rope is None or not _same_tables(q_rope, k_rope):
        return q, k, Turn()
    _, cos, sin = q_rope.args
    turn = Turn(cos, sin, bool(int(q_rope.attrs["interleaved"])))
    return q_rope.args[0], k_rope.args[0], turn


def _same_tables(a: relax.Call, b: relax.Call) -> bool:
    return (
        a.args[1].same_as(b.args[1])
        and a.args[2].same_as(b.args[2])
        and a.attrs["interleaved"] == b.attrs["interleaved"]
    )


def _take_norm(
    x: relax.Expr, heads: int, rewriter: Rewriter
) -> tuple[relax.Expr, relax.Expr | None, float]:
    """x before the RMS norm of each of its ``heads``, with gamma and epsilon, where it has one."""
    norm = rewriter.call_to(x, ops.RMS_NORM)
    if norm is None or int(norm.attrs["groups"]) != heads:
        return x, None, 0.0
    return norm.args[0], norm.args[1], float(norm.attrs["eps"])
