"""What canonical ops mean, in numpy: the whole sequence at once, from position 0, in float32.

This defines the results that compiled models are compared with. It is written for clarity; it
expands every weight and keeps every score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from tvm import relax
from tvm.ir import Op
from tvm.ir.expr import GenericConst

from slmtvm.ir import experts, ops
from slmtvm.ir.model import CanonicalModel
from slmtvm.schedules.linear.shape import FLOAT8

Array = npt.NDArray[Any]
_Attrs = Mapping[str, Any]
_Memory = dict[int, tuple[Array, Array]]  # layer -> keys and values of the source

_INT8_MAX, _UINT8_MAX = 127, 255


def evaluate(
    model: CanonicalModel, tokens: npt.ArrayLike, source: npt.ArrayLike | None = None
) -> Array:
    """Output of every position: logits (m, vocab) or hidden states (m, features), float32.

    tokens: (m,) token ids, m at most ``model.context``. source: (s,) token ids that an
    encoder-decoder reads first.
    """
    memory: _Memory = {}
    if source is not None:
        _run(model, "source", source, memory)
    return _run(model, "main", tokens, memory)


def encode_source(model: CanonicalModel, source: npt.ArrayLike) -> Array:
    """The hidden states (s, features) of an encoder-decoder's source, float32."""
    return _run(model, "source", source, {})


def _run(model: CanonicalModel, name: str, tokens: npt.ArrayLike, memory: _Memory) -> Array:
    function = model.module[name]
    values: dict[relax.Var, Array] = {function.params[0]: np.asarray(tokens, np.int32)}
    values.update({p: model.params[p.name] for p in function.params[1:]})
    for block in function.body.blocks:
        for binding in block.bindings:
            values[binding.var] = _value(binding.value, values, model.kind, memory)
    return values[function.body.body]


def _value(
    expr: relax.Expr, values: Mapping[relax.Var, Array], kind: str, memory: _Memory
) -> Array:
    if isinstance(expr, relax.Var):
        return values[expr]
    if isinstance(expr, GenericConst):
        return np.asarray(expr.value.numpy())
    assert isinstance(expr, relax.Call) and isinstance(expr.op, Op), expr
    name = expr.op.name
    if name == "relax.strided_slice":
        begin, end = (int(expr.args[i].fields[0].value) for i in (2, 3))
        return _value(expr.args[0], values, kind, memory)[:, begin:end]
    if name == "relax.concat":
        parts = [_value(part, values, kind, memory) for part in expr.args[0].fields]
        return np.concatenate(parts, axis=1)
    if name in ELEMENTWISE or name in _ROWWISE:
        function = ELEMENTWISE.get(name) or _ROWWISE[name]
        operands = [_value(a, values, kind, memory) for a in expr.args]
        return np.asarray(function(*operands), np.float32)
    attrs = {key: expr.attrs[key] for key in expr.attrs.keys()}  # noqa: SIM118 (not a dict)
    if name in _WITH_OPERANDS:
        named = {key: _value(arg, values, kind, memory) for key, arg in ops.operands(expr).items()}
        return _WITH_OPERANDS[name](
            _value(expr.args[0], values, kind, memory), attrs, kind, **named
        )
    inputs = [_value(a, values, kind, memory) for a in expr.args]
    if name == "slm.remember":
        memory[int(attrs["layer"])] = inputs[1], inputs[2]
        return inputs[0]
    if name == "slm.cross_attention":
        keys, values_kept = memory[int(attrs["layer"])]
        return _attend(attrs, inputs[0], keys, values_kept)
    return _CANONICAL[name](attrs, *inputs)


def unpack_int4(packed: Array, columns: int) -> Array:
    """uint8 (n, bytes), low nibble first -> values 0..15 (n, columns)."""
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return np.asarray(nibbles[:, :columns])


def dequantize(
    weight: Array,
    scales: Array | None,
    zero_points: Array | None,
    *,
    format: str,
    group_size: int,
    columns: int,
) -> Array:
    """A weight or table in any canonical format as float32 (rows, columns)."""
    if format in ("f32", "f16"):
        return weight.astype(np.float32)
    if format == "bf16":
        return weight.view(ml_dtypes.bfloat16).astype(np.float32)
    assert scales is not None
    if format in FLOAT8:
        weight = weight.view(f"float8_{format}").astype(np.float32)
    values = unpack_int4(weight, columns) if format == "int4" else weight
    default = 8 if format == "int4" else 0
    zeros = np.full(scales.shape, default) if zero_points is None else zero_points

    def spread(per: Array) -> Array:
        if group_size:
            return np.repeat(per, group_size, axis=1)[:, :columns]
        return per.reshape(-1, 1)

    offset = values.astype(np.float32) - spread(zeros).astype(np.float32)
    return np.asarray(offset * spread(scales).astype(np.float32))


def quantize_blocks(x: Array, group_size: int) -> Array:
    """x rounded to symmetric int8 for each row and block of ``group_size``, scale amax / 127."""
    m, k = x.shape
    padded = np.zeros((m, -(-k // group_size) * group_size), np.float32)
    padded[:, :k] = x
    blocks = padded.reshape(m, -1, group_size)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    scale = largest / np.float32(_INT8_MAX)
    # A product with the inverse, as onnxruntime has it: a division rounds otherwise.
    full = np.full_like(largest, _INT8_MAX)
    inverse = np.divide(full, largest, out=np.zeros_like(largest), where=scale > 0)
    levels = np.rint(blocks * inverse)
    return np.asarray((levels * scale).reshape(m, -1)[:, :k])


def quantize_rows(x: Array) -> Array:
    """x rounded as ONNX DynamicQuantizeLinear does, each row on its own."""
    low = np.fmin(np.fmin.reduce(x, axis=1, keepdims=True), 0)
    high = np.fmax(np.fmax.reduce(x, axis=1, keepdims=True), 0)
    scale = ((high - low) / np.float32(_UINT8_MAX)).astype(np.float32)
    scale = np.where(scale > 0, scale, np.float32(1))
    zero = np.clip(np.rint(-low / scale), 0, _UINT8_MAX)
    levels = np.clip(np.rint(x / scale) + zero, 0, _UINT8_MAX)
    return np.asarray(((levels - zero) * scale).astype(np.float32))


def _embedding(tokens: Array, attrs: _Attrs, _kind: str, table: Array, **quantized: Array) -> Array:
    dim, format, group_size = int(attrs["dim"]), str(attrs["format"]), int(attrs["group_size"])
    rows = {k: v[tokens] if len(v) > 1 else v for k, v in quantized.items()}
    return dequantize(
        table[tokens], rows.get("scales"), rows.get("zero_points"),
        format=format, group_size=group_size, columns=dim,
    )  # fmt: skip


def _linear(x: Array, attrs: _Attrs, kind: str, weight: Array, **named: Array) -> Array:
    group_size, activation = int(attrs["group_size"]), str(attrs["activation"])
    w = dequantize(
        weight, named.get("scales"), named.get("zero_points"),
        format=str(attrs["format"]), group_size=group_size, columns=int(attrs["k"]),
    )  # fmt: skip
    if activation == "block":
        x = quantize_blocks(x, group_size)
    elif activation == "row_u8":
        # An encoder's only step is the whole sequence: one range, as in the file.
        x = quantize_rows(x.reshape(1, -1)) if kind == "encoder" else quantize_rows(x)
        x = x.reshape(-1, int(attrs["k"]))
    y = x @ w.T
    return np.asarray(y + named["bias"] if "bias" in named else y)


def _quantize_dequantize(attrs: _Attrs, x: Array) -> Array:
    return _rounded(x, float(attrs["scale"]), int(attrs["low"]), int(attrs["high"]))


def _rounded(x: Array, scale: float, low: float, high: float) -> Array:
    ideal = np.nan_to_num(x / np.float32(scale), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    levels = np.rint(np.clip(ideal, low, high))
    return np.asarray(levels.astype(np.float32) * np.float32(scale))


def choose_experts(
    logits: Array, bias: Array | None, routing: experts.Routing
) -> tuple[Array, Array]:
    """The experts of each row of logits (m, experts) and their weights, both (m, top_k)."""
    if routing.score == "softmax":
        scores = _softmax(logits)
    else:
        scores = _sigmoid(logits) if routing.score == "sigmoid" else logits
    by = scores if bias is None else scores + bias
    chosen = np.argsort(-by, axis=1, kind="stable")[:, : routing.top_k]
    weights = np.take_along_axis(scores, chosen, axis=1)
    if routing.normalize == "sum":
        weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(routing.eps))
    elif routing.normalize == "softmax":
        weights = _softmax(weights)
    return chosen, np.asarray(weights * np.float32(routing.scale))


def apply_gate(gate: experts.Gate, x: Array) -> Array:
    """What lies between the two layers of an expert, on rows of x."""
    if gate.activation == "identity":
        return x
    if gate.activation != "swiglu":
        return np.asarray(ELEMENTWISE[f"relax.nn.{gate.activation.removesuffix('_erf')}"](x))
    half = x.shape[1] // 2
    g = np.minimum(x[:, :half], np.float32(gate.limit))
    linear = np.clip(x[:, half:], -np.float32(gate.limit), np.float32(gate.limit))
    return np.asarray(g * _sigmoid(np.float32(gate.alpha) * g) * (linear + np.float32(gate.beta)))


def _moe(x: Array, attrs: _Attrs, _kind: str, logits: Array, **named: Array) -> Array:
    routing, gate = experts.Routing.of(attrs), experts.gate_of(attrs)
    chosen, weights = choose_experts(logits, named.get("selection_bias"), routing)
    layers = {name: experts.ExpertLayer.of(attrs, f"{name}_") for name in ("up", "down")}
    y = np.zeros((len(x), layers["down"].n), np.float32)
    for expert in range(routing.experts):
        rows, slots = np.nonzero(chosen == expert)
        if not rows.size:
            continue

        def apply(name: str, h: Array, expert: int = expert) -> Array:
            own = {k: v[expert] for k, v in experts.layer_operands(named, name).items()}
            return _linear(h, vars(layers[name]), "decoder", **own)

        part = apply("down", apply_gate(gate, apply("up", x[rows])))
        np.add.at(y, rows, part * weights[rows, slots, None])
    return y


def _causal_conv(
    x: Array, _attrs: _Attrs, _kind: str, weight: Array, bias: Array | None = None
) -> Array:
    taps = len(weight)
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1]), x.dtype), x])
    y = sum(weight[j] * padded[j : j + len(x)] for j in range(taps))
    return np.asarray(y if bias is None else y + bias)


def _rms_norm(attrs: _Attrs, x: Array, gamma: Array) -> Array:
    parts = x.reshape(len(x), int(attrs["groups"]), -1)
    square = np.mean(parts * parts, axis=2, keepdims=True)
    return np.asarray(parts / np.sqrt(square + np.float32(attrs["eps"])) * gamma).reshape(x.shape)


def _layer_norm(attrs: _Attrs, x: Array, gamma: Array, beta: Array) -> Array:
    parts = x.reshape(len(x), int(attrs["groups"]), -1)
    centred = (parts - parts.mean(axis=2, keepdims=True)).reshape(x.shape)
    return np.asarray(_rms_norm(attrs, centred, gamma).reshape(parts.shape) + beta).reshape(x.shape)


def _rope(attrs: _Attrs, x: Array, cos: Array, sin: Array) -> Array:
    m, half = len(x), cos.shape[1]
    heads = x.reshape(m, int(attrs["num_heads"]), int(attrs["head_dim"]))
    if int(attrs["interleaved"]):
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    c, s = cos[:m, None, :], sin[:m, None, :]
    a, b = heads[..., first], heads[..., second]
    result = heads.copy()
    result[..., first], result[..., second] = a * c - b * s, b * c + a * s
    return result.reshape(m, -1)


def _attention(attrs: _Attrs, q: Array, k: Array, v: Array, bias: Array | None = None) -> Array:
    m, causal = len(q), str(attrs["mask"]) == "causal"
    softcap, window = float(attrs["softcap"]), int(attrs["window"])
    shift = np.zeros((1, m, m), np.float32)
    if bias is not None:
        context = bias.shape[1] if causal else (bias.shape[1] + 1) // 2
        behind = np.subtract.outer(np.arange(m), np.arange(m))
        # What is ahead has no column in a causal bias, and is hidden below.
        shift = bias[:, context - 1 - np.maximum(behind, 0 if causal else -context)]
    if causal:
        seen = np.tri(m, dtype=bool)
        if window:
            seen &= ~np.tri(m, k=-window, dtype=bool)
        shift = np.where(seen, shift, np.float32(-np.inf))
    return _attend(attrs, q, k, v, softcap, shift)


def _attend(
    attrs: _Attrs,
    q: Array,
    k: Array,
    v: Array,
    softcap: float = 0.0,
    shift: Array | None = None,
) -> Array:
    """Attention of q over all rows of k and v; ``shift`` (heads or 1, m, n) is added to scores."""
    num_heads, head_dim = int(attrs["num_heads"]), int(attrs["head_dim"])
    num_kv_heads = int(attrs["num_kv_heads"])

    def split(x: Array, heads: int) -> Array:
        per_head = x.reshape(len(x), heads, head_dim).transpose(1, 0, 2)
        return np.repeat(per_head, num_heads // heads, axis=0)

    queries, keys, values = split(q, num_heads), split(k, num_kv_heads), split(v, num_kv_heads)
    scores = queries @ keys.transpose(0, 2, 1)
    for factor, scale, low, high in ops.parse_roundings(str(attrs.get("roundings", ""))):
        scores = _rounded(scores * np.float32(factor), scale, low, high)
    scores = scores * np.float32(attrs["scale"])
    if softcap:
        scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
    if shift is not None:
        scores = scores + shift
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    for rounding in ops.parse_roundings(str(attrs.get("weight_rounding", ""))):
        weights = _rounded(weights, *rounding)
    return np.asarray((weights @ values).transpose(1, 0, 2).reshape(len(q), -1))


def _position_rows(_attrs: _Attrs, tokens: Array, table: Array) -> Array:
    return table[: len(tokens)]


_erf = np.vectorize(math.erf, otypes=[np.float32])


def _softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def _gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + _erf(x * math.sqrt(0.5))))


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


_ROWWISE: dict[str, Callable[..., Any]] = {
    "relax.max": lambda x: x.max(axis=1, keepdims=True),
    "relax.mean": lambda x: x.mean(axis=1, keepdims=True),
    "relax.min": lambda x: x.min(axis=1, keepdims=True),
    "relax.sum": lambda x: x.sum(axis=1, keepdims=True),
    "relax.take": lambda x, order: x[:, order],
}
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "relax.abs": np.abs,
    "relax.add": np.add,
    "relax.cos": np.cos,
    "relax.divide": np.divide,
    "relax.erf": _erf,
    "relax.exp": np.exp,
    "relax.log": np.log,
    "relax.maximum": np.maximum,
    "relax.minimum": np.minimum,
    "relax.multiply": np.multiply,
    "relax.negative": np.negative,
    "relax.nn.gelu": _gelu,
    "relax.nn.gelu_tanh": _gelu_tanh,
    "relax.nn.relu": lambda x: np.maximum(x, 0),
    "relax.nn.silu": lambda x: x * _sigmoid(x),
    "relax.nn.softplus": lambda x: np.logaddexp(np.float32(0), x),
    "relax.power": np.power,
    "relax.sigmoid": _sigmoid,
    "relax.sin": np.sin,
    "relax.sqrt": np.sqrt,
    "relax.subtract": np.subtract,
    "relax.tanh": np.tanh,
}
_WITH_OPERANDS: dict[str, Callable[..., Array]] = {
    "slm.causal_conv": _causal_conv,
    "slm.embedding": _embedding,
    "slm.linear": _linear,
    "slm.moe": _moe,
}
_CANONICAL: dict[str, Callable[..., Array]] = {
    "slm.quantize_dequantize": _quantize_dequantize,
    "slm.attention": _attention,
    "slm.layer_norm": _layer_norm,
    "slm.position_rows": _position_rows,
    "slm.rms_norm": _rms_norm,
    "slm.rope": _rope,
}
