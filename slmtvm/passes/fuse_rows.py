"""Norms, activations and gated units become row ops, which can quantize their result."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax
from tvm.ir import Op

from slmtvm.ir import fused, ops
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.merge_linears import merge_linears
from slmtvm.passes.rewrite import Rewriter, rewrite
from slmtvm.schedules.rows import GLUS

_UNARY = {
    "relax.nn.silu": "silu",
    "relax.nn.gelu": "gelu_erf",
    "relax.nn.gelu_tanh": "gelu_tanh",
    "relax.nn.relu": "relu",
    "relax.sigmoid": "sigmoid",
    "relax.tanh": "tanh",
}


@dataclass(frozen=True)
class FuseRows:
    """``silu(linear g) * linear u`` -> one linear and silu_glu, as with any other activation; norms
    and activations -> row.

    Rounding to a static scale goes into the row op before it, where nothing else reads that.
    """

    name = "fuse-rows"

    def apply(self, model: CanonicalModel) -> CanonicalModel:
        return rewrite(model, _rule)


def _rule(call: relax.Call, rewriter: Rewriter) -> relax.Expr | None:
    if call.op == ops.RMS_NORM or call.op == ops.LAYER_NORM:
        prologue = "rms_norm" if call.op == ops.RMS_NORM else "layer_norm"
        x, *params = call.args
        eps, groups = float(call.attrs["eps"]), int(call.attrs["groups"])
        return fused.row(x, params, prologue=prologue, eps=eps, groups=groups)
    if call.op == ops.QUANTIZE_DEQUANTIZE:
        return _rounded(call, rewriter)
    if call.op == ops.INTEGER_PAIR:
        x, y = call.args
        return fused.row(x, [y], prologue="pair", pair=str(call.attrs["pair"]))
    if call.op == ops.RESCALE:
        x, steps = call.args
        return fused.row(x, [steps], prologue="rescale", unit=float(call.attrs["unit"]))
    if not isinstance(call.op, Op):
        return None
    if call.op.name in _UNARY:
        return fused.row(call.args[0], [], prologue=_UNARY[call.op.name])
    if call.op.name == "relax.add":
        for x, other in (call.args, list(call.args)[::-1]):
            positions = rewriter.call_to(other, ops.POSITION_ROWS)
            if positions is not None and len(x.ty.shape.values) == 2:
                return fused.add_positions(x, positions.args[1])
    if call.op.name == "relax.multiply":
        for gate, up in (call.args, list(call.args)[::-1]):
            activated = rewriter.call_to(gate, fused.ROW)
            if activated is None or not _can_gate(activated):
                continue
            gate_up = merge_linears([activated.args[0], up], rewriter)
            if gate_up is not None:
                return fused.row(gate_up, [], prologue=_gated(activated))
    return None


def _gated(activated: relax.Call) -> str:
    """The prologue that multiplies as well."""
    return f"{activated.attrs['prologue']}_glu"


def _can_gate(activated: relax.Call) -> bool:
    return _gated(activated) in GLUS and str(activated.attrs["epilogue"]) == "f32"


def _rounded(call: relax.Call, rewriter: Rewriter) -> relax.Expr:
    (x,) = call.args
    rounding = fused.rounding_of(call)
    made = rewriter.call_to(x, fused.ROW)
    if made is None or not _can_round(made) or len(rewriter.readers(x)) != 1:
        return fused.row(x, [], prologue="copy", epilogue="rounded", rounding=rounding)
    return fused.row_stored(made, epilogue="rounded", rounding=rounding)


def _can_round(row: relax.Call) -> bool:
    return str(row.attrs["epilogue"]) == "f32" and int(row.attrs["groups"]) == 1
