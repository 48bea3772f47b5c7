"""Linear layers with quantized weights read rows that are quantized once for all readers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from tvm import relax, tirx

from slmtvm.ir import expert_roundings, experts, fused, ops
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.rewrite import Rewriter, rewrite
from slmtvm.schedules.experts.points import HIDDEN, INPUT
from slmtvm.schedules.linear.shape import BYTE_INTEGERS, GROUP_SIZES

ACTIVATIONS = ("int8", "file", "f32")
"""What a compilation makes of float rows that meet quantized weights, see ``QuantizeActivations``.
"""

_BYTE_LEVELS = 256
_Rounding = tuple[float, int, int]
_NO_ROUNDING: _Rounding = (0.0, 0, 0)


@dataclass(frozen=True)
class _Row:
    """How ``slm.linear`` wants its input: the epilogue of a row op, and its attributes."""

    epilogue: str
    group_size: int = 0
    rounding: _Rounding = _NO_ROUNDING


_FLOAT = _Row("f32")


@dataclass(frozen=True)
class QuantizeActivations:
    """linear(x) -> quantized_linear(*row(x)), the row op taken into the one that made x.

    Integer weights in groups take "block" rows (w4a8), int8 weights with one scale a channel
    take "row_u8" rows; float weights take x as it is. Rows that the file itself rounds with a
    static scale are not rounded again: 8-bit ones are used as the integers that they are.

    ``activations``: "int8" rounds x whether the file asks for that or not, "file" only where it
    does, "f32" never.

    The linear layers of experts take their rows likewise; what an expert rounds for itself alone
    is used as integers where it comes to that.
    """

    activations: str = "int8"
    name = "quantize-activations"

    def apply(self, model: CanonicalModel) -> CanonicalModel:
        return rewrite(model, _Rule(model.kind, self.activations))


@dataclass
class _Rule:
    """Remembers the quantized rows that it has emitted."""

    kind: str  # of the model
    activations: str
    rows: dict[tuple[relax.Expr, _Row], list[relax.Expr]] = field(default_factory=dict)
    rounded: dict[relax.Expr, _Rounding] = field(default_factory=dict)  # kept beside the integers

    def __call__(self, call: relax.Call, rewriter: Rewriter) -> relax.Expr | None:
        if call.op == fused.ROW:
            return self._quantize_where_made(call, rewriter)
        if not _is_linear(call):
            return None
        x = call.args[0]
        named = _with_weight_shapes(call, rewriter)
        routed = rewriter.call_to(x, experts.ROUTED_ROW)
        if routed is not None and _ends_rounded(routed):
            return self._on_routed(call, routed, named, rewriter)
        rounding = self.rounded.get(x) or _rounding(rewriter.call_to(x, fused.ROW))
        row = self._row(call, rounding, rewriter)
        if row == _FLOAT:
            return _on([x], call, named, "f32")
        if (x, row) not in self.rows:
            made = fused.row(
                x, [], prologue="copy", epilogue=row.epilogue, group_size=row.group_size,
                rounding=row.rounding,
            )  # fmt: skip
            self.rows[x, row] = _fields(rewriter.emit(made), rewriter)
        scheme = "block" if row.epilogue == "block" else "row_u8"
        return _on(self.rows[x, row], call, named, scheme)

    def _on_routed(
        self,
        call: relax.Call,
        made: relax.Call,
        named: dict[str, relax.Expr],
        rewriter: Rewriter,
    ) -> relax.Call:
        """An expert's layer on rows that the file rounds for each expert."""
        tables = expert_roundings.among(ops.operands(made))
        last = rewriter.array(list(tables.values())[-1])
        assert last is not None
        fits = bool((last[:, 2] - last[:, 1] < _BYTE_LEVELS).all())
        if str(call.attrs["format"]) != "int8" or int(call.attrs["group_size"]) or not fits:
            return _on([call.args[0]], call, named, "f32")
        integers = experts.routed_row(
            made.args[0], made.args[1], tables, activation=str(made.attrs["activation"]),
            by_pair=bool(int(made.attrs["by_pair"])), quantized=True,
        )  # fmt: skip
        return _on(_fields(rewriter.emit(integers), rewriter), call, named, "row_u8")

    def _quantize_where_made(self, call: relax.Call, rewriter: Rewriter) -> relax.Expr | None:
        """The row op with the epilogue its readers want, and its float result if one reads it."""
        rounding = _rounding(call)
        wanted = [
            self._row(r, rounding, rewriter) if _is_linear(r) else _FLOAT
            for r in rewriter.now_read_by
        ]
        quantized = set(wanted) - {_FLOAT}
        # Quantization is of whole rows, a norm with groups of their parts.
        if len(quantized) != 1 or int(call.attrs["groups"]) > 1:
            return None
        (row,) = quantized
        keep = _FLOAT in wanted
        made = rewriter.emit(
            fused.row_stored(
                call, epilogue=row.epilogue, group_size=row.group_size, keep_float=keep,
                rounding=row.rounding,
            )
        )  # fmt: skip
        # Without other readers the float row stands for the value and is dropped as dead.
        value = rewriter.emit(relax.TupleGetItem(made, 3) if keep else call)
        self.rows[value, row] = _fields(made, rewriter)
        self.rounded[value] = rounding
        return value

    def _row(self, call: relax.Call, rounding: _Rounding, rewriter: Rewriter) -> _Row:
        """How ``slm.linear`` takes an input that is rounded so."""
        weights, group = str(call.attrs["format"]), int(call.attrs["group_size"])
        asked = str(call.attrs["activation"])
        # Products whose scales change with every k cannot be added up as integers.
        if weights not in BYTE_INTEGERS or int(call.attrs.get("group_channels", 0)):
            return _FLOAT
        if group and group not in GROUP_SIZES:
            return _FLOAT
        if rounding != _NO_ROUNDING:
            _, low, high = rounding
            fits = weights == "int8" and not group and high - low < _BYTE_LEVELS
            return _Row("static_u8", 0, rounding) if fits else _FLOAT
        if self.activations == "f32" or (self.activations == "file" and asked == "f32"):
            return _FLOAT
        if group:
            return _Row("block", group)
        # An encoder sees all tokens at once, as the file's DynamicQuantizeLinear does. A decoder
        # sees them in chunks, whose division must not change results. A pooled row is alone.
        encodes = self.kind == "encoder" or rewriter.name == "source"
        encodes = encodes and not isinstance(ops.rows(call.args[0]), tirx.IntImm)
        whole = encodes and asked == "row_u8" and call.op == ops.LINEAR
        return _Row("tensor_u8" if whole else "row_u8")


def _rounding(made: relax.Call | None) -> _Rounding:
    """How the row op that made a value has rounded it."""
    return _NO_ROUNDING if made is None else fused.rounding_of(made)


def _ends_rounded(row: relax.Call) -> bool:
    """Whether the results of an ``slm.routed_row`` are rounded."""
    return bool(expert_roundings.among(ops.operands(row), (INPUT, HIDDEN)))


def _is_linear(expr: relax.Expr) -> bool:
    return isinstance(expr, relax.Call) and expr.op in (ops.LINEAR, experts.ROUTED_LINEAR)


def _on(
    inputs: list[relax.Expr], call: relax.Call, named: dict[str, relax.Expr], activation: str
) -> relax.Call:
    """The layer of ``call`` on the row(s) ``inputs``, which are held as ``activation``."""
    if call.op == experts.ROUTED_LINEAR:
        layer = experts.with_format(experts.ExpertLayer.of(call.attrs), activation)
        return experts.routed_linear(
            inputs, call.args[1], named, layer,
            experts=int(call.attrs["experts"]), by_pair=bool(int(call.attrs["by_pair"])),
        )  # fmt: skip
    op = fused.FLOAT_LINEAR if activation == "f32" else fused.QUANTIZED_LINEAR
    return fused.linear_on(inputs, call, named, op, activation)


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
