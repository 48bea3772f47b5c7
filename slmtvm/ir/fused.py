"""The ops that the passes fuse canonical ops into; each becomes one or two kernels.

They are Relax ops like those of ``ops.py`` and follow the same conventions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.relax import Expr

from slmtvm.ir.ops import define, make_call, name_operands, operands, rows
from slmtvm.schedules.rows import GATED


def padded_features(features: int, epilogue: str, group_size: int) -> int:
    """Columns of a quantized row: whole groups for "block", else whole 16s."""
    multiple = group_size if epilogue == "block" else 16
    return -(-features // multiple) * multiple


def _row_type(call: relax.Call) -> relax.Type:
    m, d = rows(call.args[0]), int(call.args[0].ty.shape[1])
    attrs = call.attrs
    features = d // 2 if str(attrs["prologue"]) in GATED else d
    floats = relax.TensorType((m, features), "float32")
    epilogue = str(attrs["epilogue"])
    if epilogue in ("f32", "rounded"):
        return floats
    group = int(attrs["group_size"])
    padded = padded_features(features, epilogue, group)
    blocks = padded // group if epilogue == "block" else 1
    fields = [
        # The ISA decides whether row_u8 is held biased to int8; both are one byte.
        relax.TensorType((m, padded), "int8"),
        relax.TensorType((m, blocks), "float32"),
        relax.TensorType((m, blocks), "float32" if epilogue == "block" else "int32"),
    ]
    return relax.TupleType([*fields, floats] if int(attrs["keep_float"]) else fields)


def _features_n(call: relax.Call) -> relax.Type:
    return relax.TensorType((rows(call.args[0]), int(call.attrs["n"])), "float32")


def _attention_rows(call: relax.Call) -> relax.Type:
    features = int(call.attrs["num_heads"]) * int(call.attrs["head_dim"])
    return relax.TensorType((rows(call.args[0]), features), "float32")


ROW = define("slm.row", _row_type)
QUANTIZED_LINEAR = define("slm.quantized_linear", _features_n)
FLOAT_LINEAR = define("slm.float_linear", _features_n)
ADD_POSITIONS = define("slm.add_positions", lambda call: call.args[0].ty)
REMEMBER_ROWS = define("slm.remember_rows", lambda call: call.args[0].ty)
QKV_ATTENTION = define("slm.qkv_attention", _attention_rows)
SHORT_CONV = define(
    "slm.short_conv",
    lambda call: relax.TensorType((rows(call.args[0]), int(call.attrs["channels"])), "float32"),
)


def row(
    x: Expr,
    params: list[Expr],
    *,
    prologue: str,
    epilogue: str = "f32",
    group_size: int = 0,
    eps: float = 0.0,
    keep_float: bool = False,
    rounding: tuple[float, int, int] = (0.0, 0, 0),
    groups: int = 1,
    pair: str = "",
    unit: float = 0.0,
) -> relax.Call:
    """A prologue on each row of x float32 (m, d), and its result as float32 or quantized.

    A norm with ``groups``, for "f32" only, norms that many equal parts of a row each on its own.

    ``epilogue`` "f32": float32 (m, features). "block": the tuple (q int8 (m, padded),
    scale float32 (m, padded / group_size), sum of q float32, same shape). "row_u8": the tuple
    (q one byte each (m, padded), scale float32 (m, 1), zero_point int32 (m, 1)); "tensor_u8" the
    same with one range for all valid rows. "rounded": float32 (m, features) after
    ``slm.quantize_dequantize`` with the scale, low and high of ``rounding``; "static_u8": the tuple
    of "row_u8" that holds the same numbers. ``keep_float`` adds the float32 result, rounded in the
    latter case, as the tuple's last field. ``pair``: as ``slm.integer_pair`` has it, for the
    prologue "pair", whose parameter is y; ``unit``: that of ``slm.rescale``.
    """
    scale, low, high = rounding
    return make_call(
        ROW, [x, *params], prologue=prologue, epilogue=epilogue, group_size=group_size, eps=eps,
        keep_float=int(keep_float), scale=scale, low=low, high=high, groups=groups, pair=pair,
        unit=unit,
    )  # fmt: skip


def row_stored(
    made: relax.Call,
    *,
    epilogue: str,
    group_size: int = 0,
    keep_float: bool = False,
    rounding: tuple[float, int, int] = (0.0, 0, 0),
) -> relax.Call:
    """The row op ``made``, which has no groups, with another epilogue."""
    x, *params = made.args
    return row(
        x, params, prologue=str(made.attrs["prologue"]), epilogue=epilogue, group_size=group_size,
        eps=float(made.attrs["eps"]), keep_float=keep_float, rounding=rounding,
        pair=str(made.attrs["pair"]), unit=float(made.attrs["unit"]),
    )  # fmt: skip


def rounding_of(call: relax.Call) -> tuple[float, int, int]:
    """Scale, low and high of a row op or of ``slm.quantize_dequantize``."""
    return float(call.attrs["scale"]), int(call.attrs["low"]), int(call.attrs["high"])


def linear_on(
    inputs: list[Expr], linear: relax.Call, named: dict[str, Expr], op: tvm.ir.Op, activation: str
) -> relax.Call:
    """``slm.linear`` on the float or quantized row(s) ``inputs``, with the operands ``named``.

    QUANTIZED_LINEAR takes (q, scale, sum or zero_point), FLOAT_LINEAR takes (x,). Of the operands
    (weight, scales, zero_points, bias, residual), residual float32 (m, n) is added to the result.
    """
    args, names = name_operands(inputs, named)
    attrs = linear.attrs
    return make_call(
        op, args, operands=names, inputs=len(inputs), n=int(attrs["n"]), k=int(attrs["k"]),
        format=str(attrs["format"]), activation=activation, group_size=int(attrs["group_size"]),
        group_channels=int(attrs["group_channels"]),
    )  # fmt: skip


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of each head of queries and of keys; gammas float32 (head_dim,), None: no norm."""

    q_gamma: Expr | None = None
    k_gamma: Expr | None = None
    q_eps: float = 0.0
    k_eps: float = 0.0


@dataclass(frozen=True)
class Turn:
    """A rotation of queries and keys, as ``slm.rope``; without tables there is none."""

    cos: Expr | None = None
    sin: Expr | None = None
    interleaved: bool = False


def qkv_attention(
    projections: list[Expr],
    norms: HeadNorms,
    turn: Turn,
    attention: relax.Call,
    bases: Sequence[Expr] = (),
) -> relax.Call:
    """``slm.attention`` that norms, then rotates the heads of queries and keys itself, and projects
    these and those of values by ``bases``, matrices of three ``slm.head_linear``, if any.

    ``projections``: q, k and v, or one value whose rows are [q heads | k heads | v heads].
    """
    named = {
        "cos": turn.cos, "sin": turn.sin, "q_gamma": norms.q_gamma, "k_gamma": norms.k_gamma,
        **dict(zip(("q_basis", "k_basis", "v_basis"), bases, strict=False)),
        **operands(attention),
    }  # fmt: skip
    args, names = name_operands(projections, named)
    own = {
        "operands": names, "inputs": len(projections), "interleaved": int(turn.interleaved),
        "q_eps": norms.q_eps, "k_eps": norms.k_eps,
    }  # fmt: skip
    return make_call(QKV_ATTENTION, args, **{**dict(attention.attrs.items()), **own})


def remember_rows(x: Expr, kv: Expr, remember: relax.Call) -> relax.Call:
    """``slm.remember`` on kv (m, 2 * num_kv_heads * head_dim): a row is [k heads | v heads]."""
    return make_call(REMEMBER_ROWS, [x, kv], **dict(remember.attrs.items()))


def add_positions(x: Expr, table: Expr) -> relax.Call:
    """x float32 (m, d) plus rows ``position .. position + m`` of table float32 (context, d)."""
    return make_call(ADD_POSITIONS, [x, table])


def short_conv(x: Expr, conv: relax.Call, *, gated: bool) -> relax.Call:
    """``slm.causal_conv``; where ``gated``, of the parts [b | c | v] of each row of x float32
    (m, 3 * channels): ``c * causal_conv(b * v)``."""
    args, names = name_operands([x], operands(conv))
    channels = int(operands(conv)["weight"].ty.shape[1])
    return make_call(
        SHORT_CONV, args, operands=names, layer=int(conv.attrs["layer"]), channels=channels,
        gated=int(gated),
    )  # fmt: skip
