"""The canonical ops: what every export becomes, as Relax ops named ``slm.*``.

Everything else in a canonical function is a standard Relax op that works on each token alone
(``add``, ``multiply``, ``nn.silu``, ...); mixtures of experts are in ``experts.py``. A tensor of
activations is ``(m, features)``; ``m`` is the number of tokens in the step, symbolic until
``passes/specialize.py`` binds it. The position of the step's first token is ambient: the ops that
depend on it (``rope``, ``attention``, ``position_rows``, ``causal_conv``) take it from the running
step, so no value for it flows through the graph.

Optional operands are named, in order, by the attribute ``operands`` (for example
``"weight,scales,bias"``), so an op with and without bias is the same op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op, _ffi_api
from tvm.relax import Expr

from slmtvm.schedules.rows import Pair

DEFAULT_ZERO_POINTS: dict[str, np.integer[Any]] = {
    "int2": np.uint8(2), "int4": np.uint8(8), "int8": np.int8(0), "int16": np.int16(0),
}  # fmt: skip

InferType = Callable[[relax.Call], relax.Type]


def define(name: str, infer: InferType) -> Op:
    """Register a pure Relax op from Python; a second import finds it already there."""
    if name not in Op.list_op_names():
        _ffi_api.RegisterOp(name, name)
        op = Op.get(name)
        op.set_attr("FInferType", lambda call, _builder: infer(call))
        op.set_attr("FPurity", True)
    return Op.get(name)


def rows(expr: Expr) -> Any:
    """The number of rows of a value: m, symbolic or bound."""
    return expr.ty.shape[0]


def _float_rows(call: relax.Call, features: int) -> relax.TensorType:
    return relax.TensorType((rows(call.args[0]), features), "float32")


def _same_as_input(call: relax.Call) -> relax.Type:
    return call.args[0].ty


def _attended(call: relax.Call) -> relax.TensorType:
    return _float_rows(call, int(call.attrs["num_heads"]) * int(call.attrs["head_dim"]))


EMBEDDING = define("slm.embedding", lambda call: _float_rows(call, int(call.attrs["dim"])))
LINEAR = define("slm.linear", lambda call: _float_rows(call, int(call.attrs["n"])))
HEAD_LINEAR = define(
    "slm.head_linear",
    lambda call: _float_rows(
        call, int(call.attrs["num_heads"]) * int(call.args[1].ty.shape.values[2])
    ),
)
RMS_NORM = define("slm.rms_norm", _same_as_input)
LAYER_NORM = define("slm.layer_norm", _same_as_input)
ROPE = define("slm.rope", _same_as_input)
ATTENTION = define("slm.attention", _attended)
REMEMBER = define("slm.remember", _same_as_input)
CROSS_ATTENTION = define("slm.cross_attention", _attended)
CAUSAL_CONV = define("slm.causal_conv", _same_as_input)
SEGMENTS = define("slm.segments", _same_as_input)
EARLIER = define("slm.earlier", _same_as_input)
POOL = define(
    "slm.pool",
    lambda call: relax.TensorType((1, call.args[0].ty.shape[1]), "float32"),
)
POSITION_ROWS = define(
    "slm.position_rows", lambda call: _float_rows(call, int(call.args[1].ty.shape[1]))
)


QUANTIZE_DEQUANTIZE = define("slm.quantize_dequantize", _same_as_input)
INTEGER_PAIR = define("slm.integer_pair", _same_as_input)
RESCALE = define("slm.rescale", _same_as_input)


def make_call(op: Op, args: list[Expr], **attrs: Any) -> relax.Call:
    """A call of a canonical op; attributes are ints, floats and strings."""
    return relax.Call(op, args, attrs=tvm.ir.make_node("ir.DictAttrs", **attrs))


def operands(call: relax.Call) -> dict[str, Expr]:
    """The named operands of ``call``, the arguments after its inputs, in order."""
    names = [name for name in str(call.attrs["operands"]).split(",") if name]
    return dict(zip(names, list(call.args)[len(call.args) - len(names) :], strict=True))


def name_operands(inputs: list[Expr], named: Mapping[str, Expr | None]) -> tuple[list[Expr], str]:
    """The arguments ``inputs`` and those operands that are given, and the latter's names."""
    given = {name: expr for name, expr in named.items() if expr is not None}
    return [*inputs, *given.values()], ",".join(given)


def embedding(
    tokens: Expr,
    table: Expr,
    scales: Expr | None = None,
    zero_points: Expr | None = None,
    *,
    dim: int,
    format: str,
    group_size: int = 0,
    group_channels: int = 0,
) -> relax.Call:
    """Row ``tokens[i]`` of a table, as float32.

    tokens: int32 (m,). table (vocab, ...) and its formats are those of ``linear``'s weight, "int8"
    also in uint8. Scales and zero_points are (1,) per tensor, (vocab,) per row, (vocab, ceil(dim /
    group_size)), or (ceil(vocab / group_channels), dim) where that many rows share one for each
    column. -> float32 (m, dim)
    """
    args, names = name_operands(
        [tokens], {"table": table, "scales": scales, "zero_points": zero_points}
    )
    return make_call(
        EMBEDDING, args, operands=names, dim=dim, format=format, group_size=group_size,
        group_channels=group_channels,
    )  # fmt: skip


def linear(
    x: Expr,
    weight: Expr,
    scales: Expr | None = None,
    zero_points: Expr | None = None,
    bias: Expr | None = None,
    *,
    n: int,
    k: int,
    format: str,
    activation: str = "f32",
    group_size: int = 0,
    group_channels: int = 0,
) -> relax.Call:
    """``x @ W.T + bias`` with W as its file holds it, output features first.

    x: float32 (m, k). ``format``: "f32", "f16" or "bf16" (its bits in uint16), weight (n, k);
    "e4m3fn", "e4m3fnuz", "e5m2" or "e5m2fnuz" (the bits of a float8 in uint8), weight (n, k), and
    "int8" and "int16", weight int8 or int16 (n, k), all with scales (1,), (n,) or
    (n, ceil(k / group_size)); "int4" and "int2", weight uint8 (n, ceil(k / 2)) or (n, ceil(k / 4)),
    the first k in the lowest bits, scales (n, ceil(k / group_size)).
    W = (q - zero_point) * scale; zero_points have the shape of scales and the dtype of the weight,
    or are float32; DEFAULT_ZERO_POINTS where there are none.
    group_size 0 means the scale does not change along k, unless ``group_channels`` is not 0: then
    scales and integer zero_points are (ceil(n / group_channels), k), one for each k and so many
    output channels, a power of two from 4 on. bias: float32 (n,).

    ``activation`` is what the file asks of x: "f32" nothing; "block" symmetric int8 per row and
    block of ``group_size``, scale amax / 127 (MatMulNBits accuracy_level 4); "row_u8" ONNX
    DynamicQuantizeLinear, on each row of a decoder, whose results must not depend on how a prompt
    is divided into steps, and on all rows together in an encoder. -> float32 (m, n)
    """
    args, names = name_operands(
        [x], {"weight": weight, "scales": scales, "zero_points": zero_points, "bias": bias}
    )
    return make_call(
        LINEAR, args, operands=names, n=n, k=k, format=format, activation=activation,
        group_size=group_size, group_channels=group_channels,
    )  # fmt: skip


def head_linear(x: Expr, weight: Expr, bias: Expr | None = None, *, num_heads: int) -> relax.Call:
    """Each head of a row by a matrix of its own or of its group of heads, plus ``bias``.

    x: float32 (m, num_heads * k). weight: float32 (groups, k, n), input features first; head h
    takes ``weight[h // (num_heads // groups)]``. bias: float32 (num_heads * n,).
    -> float32 (m, num_heads * n)
    """
    args, names = name_operands([x], {"weight": weight, "bias": bias})
    return make_call(HEAD_LINEAR, args, operands=names, num_heads=num_heads)


def quantize_dequantize(x: Expr, *, scale: float, low: int, high: int) -> relax.Call:
    """``q * scale`` for q = x / scale rounded half to even, within low and high.

    What QuantizeLinear and DequantizeLinear with one constant scale and zero point make of x;
    low <= 0 <= high are the ends of the integer type less the zero point. x float32 (m, d).
    """
    return make_call(QUANTIZE_DEQUANTIZE, [x], scale=scale, low=low, high=high)


def integer_pair(x: Expr, y: Expr, *, pair: Pair) -> relax.Call:
    """The sum or product of integers that x and y stand for, in whole steps of the result's scale.

    What QLinearAdd and QLinearMul compute but for the bounds of the integer type, which a
    ``quantize_dequantize`` sets. x float32 (m, d); y float32 (m, d), (d,) or (m, 1); both came out
    of a ``quantize_dequantize``, or are constants that a DequantizeLinear would make.
    -> float32 (m, d)
    """
    return make_call(INTEGER_PAIR, [x, y], pair=str(pair))


def rescale(x: Expr, steps: Expr, *, unit: float) -> relax.Call:
    """x, whole multiples of ``steps``, in the nearest multiples of ``unit``.

    What QLinearMatMul and QGemm make of their sums of integers but for the bounds of the integer
    type, as ``integer_pair``. x float32 (m, d), each a multiple but for roundings; steps float32
    (d,). -> float32 (m, d)
    """
    return make_call(RESCALE, [x, steps], unit=unit)


def rms_norm(x: Expr, gamma: Expr, *, eps: float, groups: int = 1) -> relax.Call:
    """``x / sqrt(mean(x**2) + eps) * gamma``; x float32 (m, groups * d), gamma float32 (d,).

    Each of the ``groups`` equal parts of a row is normed on its own, such as the heads of queries.
    """
    return make_call(RMS_NORM, [x, gamma], eps=eps, groups=groups)


def layer_norm(x: Expr, gamma: Expr, beta: Expr, *, eps: float, groups: int = 1) -> relax.Call:
    """``(x - mean) / sqrt(var + eps) * gamma + beta`` of each part of a row, as ``rms_norm``.

    x float32 (m, groups * d), gamma and beta float32 (d,), biased variance.
    """
    return make_call(LAYER_NORM, [x, gamma, beta], eps=eps, groups=groups)


def rope(
    x: Expr, cos: Expr, sin: Expr, *, num_heads: int, head_dim: int, interleaved: bool = False
) -> relax.Call:
    """Rotary position embedding of x float32 (m, num_heads * head_dim).

    cos, sin: float32 (context, r / 2) tables, indexed by position; the first r <= head_dim
    features of each head are rotated, in pairs (i, i + r / 2), or (2 i, 2 i + 1) where
    ``interleaved``: ``a' = a cos - b sin``, ``b' = b cos + a sin``. (RoFormer, arXiv:2104.09864)
    """
    return make_call(
        ROPE, [x, cos, sin], num_heads=num_heads, head_dim=head_dim, interleaved=int(interleaved)
    )


def attention(
    q: Expr,
    k: Expr,
    v: Expr,
    bias: Expr | None = None,
    sinks: Expr | None = None,
    visible: Expr | None = None,
    *,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    mask: str,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    bias_by: str = "distance",
    roundings: str = "",
    sum_roundings: str = "",
    weight_roundings: str = "",
) -> relax.Call:
    """Softmax attention of the step's queries over all positions up to now.

    q: float32 (m, num_heads * head_dim); k, v: float32 (m, num_kv_heads * head_dim), appended to
    the cache of ``layer``; query head h reads kv head ``h // (num_heads // num_kv_heads)``.
    ``mask``: "causal", or "bidirectional" over the valid tokens of the (only) step, without a
    cache. An encoder has no cache for "causal" either: its only step is the whole sequence.

    A score is ``s = scale * q . k``; then ``softcap * tanh(s / softcap)`` where ``softcap`` is not
    0; then plus ``bias[head, context - 1 + j - i]`` for position i's view of position j. bias:
    float32 (num_heads, context) for "causal", (num_heads, 2 * context - 1) for "bidirectional".
    Where ``bias_by`` is not "distance" but "key", it is plus ``bias[head, j]``, of float32
    (num_heads, context). Where ``window`` is not 0, position i sees only positions j with
    ``i - j < window`` ("causal" only). Where ``chunk`` is not 0, it sees only positions of its own
    block of so many, ``i // chunk == j // chunk``. The softmax of head h counts one score more,
    ``sinks[h]``, of no position, where there are sinks, float32 (num_heads,). Where there is a
    ``visible``, uint8 (1 or num_heads, context, ceil(context / 8)), position i sees only positions
    j whose bit of ``numpy.packbits`` in ``visible[h, i]`` is set, itself among them; there is no
    window or chunk then.

    ``roundings``, "factor:scale:low:high" for each and joined by ";": before ``scale``, products
    are multiplied by the factor and rounded as ``quantize_dequantize`` does, in order.
    ``sum_roundings``, more of the same, round what a cap and a bias make of them;
    ``weight_roundings`` the softmax's results.
    -> float32 (m, num_heads * head_dim)
    """
    args, names = name_operands([q, k, v], {"bias": bias, "sinks": sinks, "visible": visible})
    return make_call(
        ATTENTION, args, operands=names, layer=layer, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, scale=scale, mask=mask, window=window,
        chunk=chunk, softcap=softcap, bias_by=bias_by, roundings=roundings,
        sum_roundings=sum_roundings, weight_roundings=weight_roundings,
    )  # fmt: skip


def parse_roundings(text: str) -> tuple[tuple[float, ...], ...]:
    """What ``attention``'s attributes of this kind say: levels are the last two of each."""
    parts = [part.split(":") for part in text.split(";") if part]
    return tuple((*map(float, part[:-2]), *map(int, part[-2:])) for part in parts)


def remember(
    x: Expr, k: Expr, v: Expr, *, layer: int, num_kv_heads: int, head_dim: int
) -> relax.Call:
    """x itself; k and v are kept for the ``cross_attention`` of ``layer`` until the next source.

    x: float32 (m, features), all rows of the source at once; k, v: float32
    (m, num_kv_heads * head_dim). -> float32 (m, features)
    """
    return make_call(REMEMBER, [x, k, v], layer=layer, num_kv_heads=num_kv_heads, head_dim=head_dim)


def cross_attention(
    q: Expr,
    *,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    roundings: str = "",
    weight_roundings: str = "",
) -> relax.Call:
    """Softmax attention of the step's queries over all positions of the source.

    q: float32 (m, num_heads * head_dim); keys and values are those that ``remember`` kept for
    ``layer``; the rest is that of ``attention``. -> float32 (m, num_heads * head_dim)
    """
    return make_call(
        CROSS_ATTENTION, [q], layer=layer, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, scale=scale, roundings=roundings, weight_roundings=weight_roundings,
    )  # fmt: skip


def segments(tokens: Expr) -> relax.Call:
    """Of which text each token is, 0 where nobody says. tokens int32 (m,) -> int32 (m,)"""
    return make_call(SEGMENTS, [tokens])


def earlier(tokens: Expr, *, first: int) -> relax.Call:
    """The token before each one, of an encoder's whole sequence: before the first one the token
    ``first``, or where that is negative the sequence's last. tokens int32 (m,) -> int32 (m,)"""
    return make_call(EARLIER, [tokens], first=first)


POOLS = ("first", "last", "mean", "weightedmean", "max")


def pool(x: Expr, *, how: str) -> relax.Call:
    """One row of all rows of x float32 (m, features), as ``how`` says: its first or last row, or
    the mean or greatest of each feature; in a weighted mean row i weighs i + 1. Rows of hidden
    tokens count for none but "first", where they are keys without weight. The sum of a mean goes
    from the first row to the last.
    -> float32 (1, features)
    """
    return make_call(POOL, [x], how=how)


def position_rows(tokens: Expr, table: Expr) -> relax.Call:
    """Rows ``position .. position + m`` of table float32 (context, d). -> float32 (m, d)"""
    return make_call(POSITION_ROWS, [tokens, table])


def causal_conv(x: Expr, weight: Expr, bias: Expr | None = None, *, layer: int) -> relax.Call:
    """``y[i, c] = sum_j weight[j, c] * x[i - (taps - 1) + j, c] + bias[c]``: each channel alone.

    x: float32 (m, channels), kept for the steps that follow in the cache of ``layer``, counted
    apart from attentions; rows before position 0 are zero. weight: float32 (taps, channels), the
    newest position last. bias: float32 (channels,). -> float32 (m, channels)
    """
    args, names = name_operands([x], {"weight": weight, "bias": bias})
    return make_call(CAUSAL_CONV, args, operands=names, layer=layer)
