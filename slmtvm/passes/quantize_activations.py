"""Linear layers with quantized weights read quantized rows, quantized once for all their readers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from tvm import relax

from slmtvm.ir import fused, ops
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.rewrite import Rewriter, rewrite

_RowKey = tuple[relax.Expr, str, int]


@dataclass(frozen=True)
class QuantizeActivations:
    """linear(x) -> quantized_linear(*row(x)), the row op taken into the one that made x.

    int4 and grouped int8 weights take "block" rows (w4a8), int8 weights with one scale a channel take
    "row_u8" rows; float weights take x as it is.
    """

    name = "quantize-activations"

    def apply(self, model: CanonicalModel) -> CanonicalModel:
        return rewrite(model, _Rule())


@dataclass
class _Rule:
    """Remembers the quantized rows of the function that is being rebuilt."""

    rows: dict[_RowKey, list[relax.Expr]] = field(default_factory=dict)

    def __call__(self, call: relax.Call, rewriter: Rewriter) -> relax.Expr | None:
        if call.op != ops.LINEAR:
            return None
        x = call.args[0]
        named = _with_weight_shapes(call, rewriter)
        activation, group = row_format(call)
        if activation == "f32":
            return fused.linear_on([x], call, named, fused.FLOAT_LINEAR, "f32")
        key = (x, activation, group)
        if key not in self.rows:
            self.rows[key] = _quantized_row(x, activation, group, rewriter)
        return fused.linear_on(self.rows[key], call, named, fused.QUANTIZED_LINEAR, activation)


def row_format(call: relax.Call) -> tuple[str, int]:
    """How the input of ``slm.linear`` is quantized: the epilogue of its row op and its group size."""
    weights, group = str(call.attrs["format"]), int(call.attrs["group_size"])
    if weights in ("f32", "f16"):
        return "f32", 0
    return ("block", group) if group else ("row_u8", 0)


def _quantized_row(
    x: relax.Expr, activation: str, group: int, rewriter: Rewriter
) -> list[relax.Expr]:
    """The fields of x quantized; the row op that made x is done again if x has no other reader."""
    made_by = rewriter.call_to(x, fused.ROW)
    if made_by is not None and str(made_by.attrs["epilogue"]) == "f32":
        source, *params = made_by.args
        prologue, eps = str(made_by.attrs["prologue"]), float(made_by.attrs["eps"])
    else:
        source, params, prologue, eps = x, [], "copy", 0.0
    quantized = rewriter.emit(
        fused.row(
            source, params, prologue=prologue, epilogue=activation, group_size=group, eps=eps
        )
    )
    return [rewriter.emit(relax.TupleGetItem(quantized, i)) for i in range(3)]


def _with_weight_shapes(call: relax.Call, rewriter: Rewriter) -> dict[str, relax.Expr]:
    """The layer's operands, a scale or zero point for the whole tensor made one for each channel."""
    named = ops.operands(call)
    n = int(call.attrs["n"])
    for name in ("scales", "zero_points"):
        if name not in named:
            continue
        array = rewriter.array(named[name])
        if array is not None and array.shape == (1,) and n != 1:
            label = f"{named[name].name}:{n}"
            named[name] = rewriter.add_param(label, np.ascontiguousarray(np.broadcast_to(array, n)))
    return named
