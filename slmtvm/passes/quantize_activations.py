"""Linear layers with quantized weights read rows that are quantized once for all readers."""

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

    int4 and grouped int8 weights take "block" rows (w4a8), int8 weights with one scale a channel
    take "row_u8" rows; float weights take x as it is.
    """

    name = "quantize-activations"

    def apply(self, model: CanonicalModel) -> CanonicalModel:
        return rewrite(model, _Rule(model.kind))


@dataclass
class _Rule:
    """Remembers the quantized rows that it has emitted."""

    kind: str  # of the model
    rows: dict[_RowKey, list[relax.Expr]] = field(default_factory=dict)

    def __call__(self, call: relax.Call, rewriter: Rewriter) -> relax.Expr | None:
        if call.op == fused.ROW:
            return self._quantize_where_made(call, rewriter)
        if call.op != ops.LINEAR:
            return None
        x = call.args[0]
        named = _with_weight_shapes(call, rewriter)
        activation, group = self._row_format(call)
        if activation == "f32":
            return fused.linear_on([x], call, named, fused.FLOAT_LINEAR, "f32")
        key = (x, activation, group)
        if key not in self.rows:
            row = fused.row(x, [], prologue="copy", epilogue=activation, group_size=group)
            self.rows[key] = _fields(rewriter.emit(row), rewriter)
        scheme = "block" if activation == "block" else "row_u8"
        return fused.linear_on(self.rows[key], call, named, fused.QUANTIZED_LINEAR, scheme)

    def _quantize_where_made(self, call: relax.Call, rewriter: Rewriter) -> relax.Expr | None:
        """The row op with the epilogue its readers want, and its float result if one reads it."""
        wanted = {self._row_format(r) for r in rewriter.now_read_by if _is_linear(r)} - {("f32", 0)}
        if len(wanted) != 1:
            return None
        ((activation, group),) = wanted
        keep = any(
            not _is_linear(r) or self._row_format(r)[0] == "f32" for r in rewriter.now_read_by
        )
        x, *params = call.args
        row = rewriter.emit(
            fused.row(
                x, params, prologue=str(call.attrs["prologue"]), epilogue=activation,
                group_size=group, eps=float(call.attrs["eps"]), keep_float=keep,
            )
        )  # fmt: skip
        # Without other readers the float row stands for the value and is dropped as dead.
        value = rewriter.emit(relax.TupleGetItem(row, 3) if keep else call)
        self.rows[value, activation, group] = _fields(row, rewriter)
        return value

    def _row_format(self, call: relax.Call) -> tuple[str, int]:
        """How ``slm.linear`` wants its input: the epilogue of a row op, and its group size."""
        weights, group = str(call.attrs["format"]), int(call.attrs["group_size"])
        if weights in ("f32", "f16"):
            return "f32", 0
        if group:
            return "block", group
        # An encoder sees all tokens at once, as the file's DynamicQuantizeLinear does. A decoder
        # sees them in chunks, whose division must not change results.
        dynamic = str(call.attrs["activation"]) == "row_u8"
        return ("tensor_u8" if self.kind == "encoder" and dynamic else "row_u8"), 0


def _is_linear(expr: relax.Expr) -> bool:
    return isinstance(expr, relax.Call) and expr.op == ops.LINEAR


def _fields(row: relax.Expr, rewriter: Rewriter) -> list[relax.Expr]:
    return [rewriter.emit(relax.TupleGetItem(row, i)) for i in range(3)]


def _with_weight_shapes(call: relax.Call, rewriter: Rewriter) -> dict[str, relax.Expr]:
    """The layer's operands; what holds for the whole tensor is made one for each channel."""
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
