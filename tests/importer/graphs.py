"""Small transformers written node by node, in the spellings that exporters use.

Weights are random but of the size that keeps activations near one, so that a wrong import shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
MASK_VALUE = np.float32(np.finfo(np.float32).min)


@dataclass
class GraphBuilder:
    """Collects nodes and constants; every method returns the name of a value."""

    random: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attrs) -> str:
        return self.ops(kind, *inputs, outputs=outputs, domain=domain, **attrs)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, domain: str = "", **attrs) -> list[str]:
        index = len(self.nodes)
        names = [f"{kind}_{index}_{i}" for i in range(outputs)]
        node = helper.make_node(
            kind, list(inputs), names, name=f"{kind}_{index}", domain=domain, **attrs
        )
        self.nodes.append(node)
        return names

    def constant(self, value, dtype=np.float32, name: str = "") -> str:
        array = np.asarray(value, dtype)
        if not name:
            name = f"c{len(self.constants)}"
        self.constants[name] = array
        return name

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def weight(self, *shape: int, name: str = "") -> str:
        scale = 1 / math.sqrt(shape[0])
        return self.constant(self.random.normal(size=shape) * scale, name=name)

    def near(self, centre: float, *shape: int, name: str = "") -> str:
        return self.constant(centre + 0.2 * self.random.normal(size=shape), name=name)

    def model(self, inputs, outputs) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "test", inputs, outputs,
            [numpy_helper.from_array(v, k) for k, v in self.constants.items()],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)


# --- norms ---------------------------------------------------------------------------------------


def rms_rsqrt(b: GraphBuilder, x: str, d: int) -> str:
    """gamma * (x * 1 / sqrt(mean(x**2) + eps))"""
    square = b.op("Pow", x, b.constant(2.0))
    mean = b.op("Add", b.op("ReduceMean", square, b.ints(-1)), b.constant(1e-5))
    unit = b.op("Mul", x, b.op("Reciprocal", b.op("Sqrt", mean)))
    return b.op("Mul", b.near(1, d), unit)


def rms_divide(b: GraphBuilder, x: str, d: int) -> str:
    """(x / sqrt(sum(x * x) / d + eps)) * gamma"""
    total = b.op("ReduceSum", b.op("Mul", x, x), b.ints(2))
    mean = b.op("Add", b.constant(1e-6), b.op("Div", total, b.constant(float(d))))
    return b.op("Mul", b.op("Div", x, b.op("Sqrt", mean)), b.near(1, d))


def rms_power(b: GraphBuilder, x: str, d: int) -> str:
    """x * pow(mean + eps, -0.5) * (1 + w)"""
    mean = b.op("ReduceMean", b.op("Mul", x, x), b.ints(-1))
    root = b.op("Pow", b.op("Add", mean, b.constant(1e-6)), b.constant(-0.5))
    gamma = b.op("Add", b.near(0, d), b.constant(1.0))
    return b.op("Mul", b.op("Mul", x, root), gamma)


def rms_operator(b: GraphBuilder, x: str, d: int) -> str:
    return b.op("SimplifiedLayerNormalization", x, b.near(1, d), epsilon=1e-5, axis=-1)


def layer_spelled(b: GraphBuilder, x: str, d: int) -> str:
    centred = b.op("Sub", x, b.op("ReduceMean", x, b.ints(-1)))
    variance = b.op("ReduceMean", b.op("Pow", centred, b.constant(2.0)), b.ints(-1))
    unit = b.op("Div", centred, b.op("Sqrt", b.op("Add", variance, b.constant(1e-12))))
    return b.op("Add", b.op("Mul", unit, b.near(1, d)), b.near(0, d))


def layer_without_beta(b: GraphBuilder, x: str, d: int) -> str:
    centred = b.op("Sub", x, b.op("ReduceMean", x, b.ints(-1)))
    variance = b.op("ReduceMean", b.op("Pow", centred, b.constant(2.0)), b.ints(-1))
    root = b.op("Sqrt", b.op("Add", variance, b.constant(1e-5)))
    return b.op("Mul", b.near(1, d), b.op("Mul", centred, b.op("Reciprocal", root)))


def layer_operator(b: GraphBuilder, x: str, d: int) -> str:
    return b.op("LayerNormalization", x, b.near(1, d), b.near(0, d), epsilon=1e-5, axis=-1)


NORMS: dict[str, Callable[[GraphBuilder, str, int], str]] = {
    function.__name__: function
    for function in (
        rms_rsqrt,
        rms_divide,
        rms_power,
        rms_operator,
        layer_spelled,
        layer_without_beta,
        layer_operator,
    )
}

# --- activations ---------------------------------------------------------------------------------


def silu(b: GraphBuilder, x: str) -> str:
    return b.op("Mul", x, b.op("Sigmoid", x))


def silu_divided(b: GraphBuilder, x: str) -> str:
    """x / (1 + exp(-x))"""
    return b.op("Div", x, b.op("Add", b.op("Exp", b.op("Neg", x)), b.constant(1.0)))


def gelu_erf(b: GraphBuilder, x: str) -> str:
    erf = b.op("Erf", b.op("Div", x, b.constant(math.sqrt(2))))
    return b.op("Mul", b.op("Mul", x, b.op("Add", erf, b.constant(1.0))), b.constant(0.5))


def gelu_halved(b: GraphBuilder, x: str) -> str:
    """(0.5 * x) * (1 + erf(0.7071 * x)), with the half a vector"""
    erf = b.op("Erf", b.op("Mul", b.constant(math.sqrt(0.5)), x))
    return b.op("Mul", b.op("Mul", b.constant([0.5]), x), b.op("Add", b.constant(1.0), erf))


def gelu_tanh(b: GraphBuilder, x: str) -> str:
    cube = b.op("Mul", b.constant(0.044715), b.op("Pow", x, b.constant(3.0)))
    inner = b.op("Mul", b.op("Add", x, cube), b.constant(math.sqrt(2 / math.pi)))
    outer = b.op("Add", b.op("Tanh", inner), b.constant(1.0))
    return b.op("Mul", b.op("Mul", x, b.constant(0.5)), outer)


def relu(b: GraphBuilder, x: str) -> str:
    return b.op("Relu", x)


def gelu_half_precision(b: GraphBuilder, x: str) -> str:
    """gelu_erf in float16, with the constants that it rounds."""
    x = b.op("Cast", x, to=TensorProto.FLOAT16)
    half = {n: b.constant(v, np.float16) for n, v in (("root", 2**0.5), ("one", 1), ("half", 0.5))}
    erf = b.op("Erf", b.op("Div", x, half["root"]))
    y = b.op("Mul", b.op("Mul", x, b.op("Add", erf, half["one"])), half["half"])
    return b.op("Cast", y, to=TensorProto.FLOAT)


def gelu_fused(b: GraphBuilder, x: str) -> str:
    return b.op("Gelu", x, domain="com.microsoft")


ACTIVATIONS: dict[str, tuple[Callable[[GraphBuilder, str], str], str]] = {
    "silu": (silu, "relax.nn.silu"),
    "silu_divided": (silu_divided, "relax.nn.silu"),
    "gelu_erf": (gelu_erf, "relax.nn.gelu"),
    "gelu_halved": (gelu_halved, "relax.nn.gelu"),
    "gelu_half_precision": (gelu_half_precision, "relax.nn.gelu"),
    "gelu_tanh": (gelu_tanh, "relax.nn.gelu_tanh"),
    "gelu_fused": (gelu_fused, "relax.nn.gelu"),
    "relu": (relu, "relax.nn.relu"),
}


def _operator(kind: str, domain: str = "", **attrs) -> Callable[[GraphBuilder, str], str]:
    return lambda b, x: b.op(kind, x, domain=domain, **attrs)


OTHER_ACTIVATIONS: dict[str, Callable[[GraphBuilder, str], str]] = {
    # No op of their own in the canonical model: written out.
    "clip": lambda b, x: b.op("Clip", x, b.constant(-0.4), b.constant(0.7)),
    "clip_above": lambda b, x: b.op("Clip", x, "", b.constant(0.3)),
    "elu": _operator("Elu", alpha=0.7),
    "hard_sigmoid": _operator("HardSigmoid", alpha=0.3),
    "hard_swish": _operator("HardSwish"),
    "leaky_relu": _operator("LeakyRelu", alpha=0.2),
    "max_of_three": lambda b, x: b.op("Max", x, b.constant(-0.5), b.op("Neg", x)),
    "mean": lambda b, x: b.op("Mean", x, b.op("Abs", x), b.constant(0.1)),
    "mish": _operator("Mish"),
    "prelu": lambda b, x: b.op("PRelu", x, b.constant(0.3)),
    "quick_gelu": _operator("QuickGelu", "com.microsoft"),
    "reciprocal": lambda b, x: b.op("Reciprocal", b.op("Exp", x)),
    "softsign": _operator("Softsign"),
    "squared_relu": lambda b, x: b.op("Pow", b.op("Relu", x), b.constant(2.0)),
    "sum_of_three": lambda b, x: b.op("Sum", x, x, b.op("Sin", x)),
}

# --- rotary embeddings on (1, heads, length, head_dim); cos and sin (length, r / 2) --------------


def _sliced(b: GraphBuilder, x: str, begin: int, end: int, step: int = 1) -> str:
    return b.op("Slice", x, b.ints(begin), b.ints(end), b.ints(3), b.ints(step))


def rope_rotate_half(b: GraphBuilder, x: str, cos: str, sin: str, d: int) -> str:
    """x * cat(cos, cos) + cat(-x2, x1) * cat(sin, sin)"""
    c, s = b.op("Concat", cos, cos, axis=-1), b.op("Concat", sin, sin, axis=-1)
    first, second = _sliced(b, x, 0, d // 2), _sliced(b, x, d // 2, 1 << 62)
    turned = b.op("Concat", b.op("Neg", second), first, axis=-1)
    return b.op("Add", b.op("Mul", x, c), b.op("Mul", turned, s))


def rope_split_halves(b: GraphBuilder, x: str, cos: str, sin: str, d: int) -> str:
    """cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)"""
    first, second = b.ops("Split", x, b.ints(d // 2, d // 2), outputs=2, axis=-1)
    low = b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin))
    high = b.op("Add", b.op("Mul", second, cos), b.op("Mul", first, sin))
    return b.op("Concat", low, high, axis=-1)


def rope_interleaved(b: GraphBuilder, x: str, cos: str, sin: str, d: int) -> str:
    """Pairs (2 i, 2 i + 1), stacked and flattened again."""
    even, odd = _sliced(b, x, 0, d, 2), _sliced(b, x, 1, d, 2)
    low = b.op("Sub", b.op("Mul", even, cos), b.op("Mul", odd, sin))
    high = b.op("Add", b.op("Mul", odd, cos), b.op("Mul", even, sin))
    parts = [b.op("Unsqueeze", part, b.ints(4)) for part in (low, high)]
    return b.op("Reshape", b.op("Concat", *parts, axis=4), b.ints(0, 0, 0, d))


def rope_partial(b: GraphBuilder, x: str, cos: str, sin: str, d: int) -> str:
    """The first half of the features rotated, the rest passed through; cos has d / 4 columns."""
    rotated, passed = _sliced(b, x, 0, d // 2), _sliced(b, x, d // 2, d)
    return b.op("Concat", rope_rotate_half(b, rotated, cos, sin, d // 2), passed, axis=3)


ROPES: dict[str, tuple[Callable[..., str], int, bool]] = {
    # name: (function, fraction of the head that is rotated is 1 / n, interleaved)
    "rotate_half": (rope_rotate_half, 1, False),
    "split_halves": (rope_split_halves, 1, False),
    "interleaved": (rope_interleaved, 1, True),
    "partial": (rope_partial, 2, False),
}

# --- masks ---------------------------------------------------------------------------------------


WINDOW, NARROW = 40, 3


def mask_trilu(b: GraphBuilder, scores: str, length: str) -> str:
    """Adds triu(full(min), 1)."""
    shape = b.op("Concat", length, length, axis=0)
    full = b.op("Expand", b.constant(MASK_VALUE), shape)
    return b.op("Add", scores, b.op("Trilu", full, b.constant(1, np.int64), upper=1))


def mask_where(b: GraphBuilder, scores: str, length: str) -> str:
    """where(j <= i, scores, -inf)"""
    number = b.op("Squeeze", length)
    places = b.op("Range", b.constant(0, np.int64), number, b.constant(1, np.int64))
    seen = b.op("LessOrEqual", places, b.op("Unsqueeze", places, b.ints(1)))
    return b.op("Where", seen, scores, b.constant(-np.inf))


def mask_sliced(b: GraphBuilder, scores: str, length: str) -> str:
    """A square of the largest length, cut to this one; it bounds the context."""
    square = b.constant(np.tri(MASK_POSITIONS, dtype=bool)[None, None], bool)
    seen = b.op("Slice", square, b.ints(0, 0), b.op("Concat", length, length, axis=0), b.ints(2, 3))
    return b.op("Where", seen, scores, b.constant(-1e4))


def mask_none(b: GraphBuilder, scores: str, length: str) -> str:
    return scores


def _distances(b: GraphBuilder, length: str) -> tuple[str, str]:
    """Key positions j int64 (n,), and i - j (n, n)."""
    number = b.op("Squeeze", length)
    places = b.op("Range", b.constant(0, np.int64), number, b.constant(1, np.int64))
    return places, b.op("Sub", b.op("Unsqueeze", places, b.ints(1)), places)


def mask_window(b: GraphBuilder, scores: str, length: str, window: int = WINDOW) -> str:
    """The last ``window`` positions only."""
    _, distance = _distances(b, length)
    ahead = b.op("Less", distance, b.constant(0, np.int64))
    far = b.op("GreaterOrEqual", distance, b.constant(window, np.int64))
    return b.op("Where", b.op("Or", ahead, far), b.constant(-np.inf), scores)


def mask_narrow(b: GraphBuilder, scores: str, length: str) -> str:
    """A window smaller than the lengths at which the importer looks at a graph's structure."""
    return mask_window(b, scores, length, NARROW)


def mask_chunked(b: GraphBuilder, scores: str, length: str) -> str:
    """Blocks of ten positions that see each other."""
    places, _ = _distances(b, length)
    block = b.op("Div", places, b.constant(10, np.int64))
    same = b.op("Equal", b.op("Unsqueeze", block, b.ints(1)), block)
    return mask_trilu(b, b.op("Where", same, scores, b.constant(MASK_VALUE)), length)


def mask_padded(b: GraphBuilder, scores: str, length: str) -> str:
    """The first two positions hidden from those after them."""
    places, _ = _distances(b, length)
    first = b.op("Less", places, b.constant(2, np.int64))
    late = b.op("Unsqueeze", b.op("GreaterOrEqual", places, b.constant(2, np.int64)), b.ints(1))
    hidden = b.op("Where", b.op("And", first, late), b.constant(-1e30), scores)
    return mask_trilu(b, hidden, length)


def mask_of_length(b: GraphBuilder, scores: str, length: str) -> str:
    """A bias by distance, divided by the sequence's length."""
    _, distance = _distances(b, length)
    near = b.op("Div", *(b.op("Cast", x, to=TensorProto.FLOAT) for x in (distance, length)))
    return mask_trilu(b, b.op("Sub", scores, near), length)


def bias_by_key(b: GraphBuilder, scores: str, length: str) -> str:
    """ALiBi as BLOOM has it: a slope of each head times the key's position."""
    places, _ = _distances(b, length)
    slopes = b.constant([[[0.5]], [[0.25]], [[0.125]]])
    bias = b.op("Mul", slopes, b.op("Cast", places, to=TensorProto.FLOAT))
    return mask_trilu(b, b.op("Add", bias, scores), length)


def bias_by_distance(b: GraphBuilder, scores: str, length: str) -> str:
    """ALiBi as MPT has it: minus a slope of each head times the distance."""
    _, distance = _distances(b, length)
    slopes = b.constant([[[0.5]], [[0.25]], [[0.125]]])
    bias = b.op("Mul", slopes, b.op("Cast", distance, to=TensorProto.FLOAT))
    return mask_trilu(b, b.op("Sub", scores, bias), length)


def bias_by_bucket(b: GraphBuilder, scores: str, length: str) -> str:
    """A learned bias of each bucket of distances both ways, as MPNet's and T5's encoders."""
    _, distance = _distances(b, length)
    low, high = b.constant(-9, np.int64), b.constant(9, np.int64)
    bucket = b.op("Add", b.op("Clip", distance, low, high), high)
    picked = b.op("Gather", b.near(0, 19, 3), bucket)
    bias = b.op("Unsqueeze", b.op("Transpose", picked, perm=[2, 0, 1]), b.ints(0))
    return b.op("Add", scores, bias)


def bias_both_ways(b: GraphBuilder, scores: str, length: str) -> str:
    """Positions nearer than five, before and after, as ModernBERT's local layers."""
    _, distance = _distances(b, length)
    near = b.op("Less", b.op("Abs", distance), b.constant(5, np.int64))
    return b.op("Where", near, scores, b.constant(-np.inf))


MASK_POSITIONS = 96
MASKS = {
    "trilu": (mask_trilu, "causal"),
    "where": (mask_where, "causal"),
    "sliced": (mask_sliced, "causal"),
    "none": (mask_none, "bidirectional"),
}
WINDOWS = {"window": (mask_window, WINDOW), "narrow": (mask_narrow, NARROW)}
BIASES = {
    "by_key": (bias_by_key, "causal"),
    "by_distance": (bias_by_distance, "causal"),
    "by_bucket": (bias_by_bucket, "bidirectional"),
    "both_ways": (bias_both_ways, "bidirectional"),
}
OTHER_MASKS = {
    "chunked": (mask_chunked, "which positions the mask hides depends on more"),
    "padded": (mask_padded, "which positions the mask hides depends on more"),
    "of_length": (mask_of_length, "the mask changes with the length of the sequence"),
}


# --- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """A one- or two-layer decoder or encoder; every size is odd on purpose where it may be."""

    vocab: int = 53
    hidden: int = 24
    heads: int = 3
    kv_heads: int = 3
    head_dim: int = 8
    ffn: int = 37
    layers: int = 1
    norm: str = "rms_rsqrt"
    activation: str = "silu"
    rope: str = ""  # a key of ROPES
    learned_positions: int = 0  # rows of a learned table, 0 for none
    padding: int = -1  # a token that positions do not count; none where negative
    rope_base: float = 10000.0
    mask: str = "trilu"
    bias: bool = False
    scale_on: str = "scores"  # or "queries", "both": sqrt(scale) on queries and keys
    packed_qkv: str = ""  # "parts": [q | k | v]; "heads": (q, k, v) of each head in turn
    qk_norm: str = ""  # "shared": one gamma for all heads; "own": one for each
    softcap: float = 0.0
    tied: bool = False
    block: Callable[[GraphBuilder, str, int], str] | None = None  # (b, x, hidden), for the MLP
    seed: int = 0


def build(tiny: Tiny) -> onnx.ModelProto:
    """input_ids int64 (batch, seq) -> logits float32 (batch, seq, vocab)."""
    b = GraphBuilder(np.random.default_rng(tiny.seed))
    ids = "input_ids"
    length = b.op("Shape", ids, start=1, end=2)
    embedding = b.weight(tiny.vocab, tiny.hidden, name="embedding.weight")
    b.constants[embedding] = b.random.normal(size=(tiny.vocab, tiny.hidden)).astype(np.float32)
    x = b.op("Gather", embedding, ids)
    number = b.op("Squeeze", length)
    places = b.op("Range", b.constant(0, np.int64), number, b.constant(1, np.int64))
    if tiny.learned_positions:
        table = b.near(0, tiny.learned_positions, tiny.hidden, name="positions.weight")
        at = _count_positions(b, ids, tiny.padding) if tiny.padding >= 0 else places
        x = b.op("Add", x, b.op("Gather", table, at))
    tables = _rope_tables(b, tiny, places) if tiny.rope else None
    for _ in range(tiny.layers):
        x = b.op("Add", x, _attention(b, tiny, NORMS[tiny.norm](b, x, tiny.hidden), length, tables))
        x = b.op("Add", x, _mlp(b, tiny, NORMS[tiny.norm](b, x, tiny.hidden)))
    x = NORMS[tiny.norm](b, x, tiny.hidden)
    if tiny.tied:
        head = b.op("Transpose", embedding, perm=[1, 0])
    else:
        head = b.weight(tiny.hidden, tiny.vocab, name="head.weight")
    b.op("MatMul", x, head)
    b.nodes[-1].output[0] = "logits"
    return b.model(
        [helper.make_tensor_value_info(ids, TensorProto.INT64, ["batch", "seq"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", tiny.vocab])],
    )


def _count_positions(b: GraphBuilder, ids: str, padding: int) -> str:
    """RoBERTa's position ids: padding + how many tokens up to here are not padding."""
    pad = b.op("Constant", value=numpy_helper.from_array(np.array(padding, np.int64)))
    text = b.op("Cast", b.op("Not", b.op("Equal", ids, pad)), to=TensorProto.INT32)
    count = b.op("Mul", b.op("CumSum", text, b.constant(1, np.int64)), text)
    return b.op("Add", b.op("Cast", count, to=TensorProto.INT64), pad)


def _rope_tables(b: GraphBuilder, tiny: Tiny, places: str) -> tuple[str, str]:
    _, part, _ = ROPES[tiny.rope]
    half = tiny.head_dim // part // 2
    frequencies = b.constant(tiny.rope_base ** (-np.arange(half) / half))
    position = b.op("Unsqueeze", b.op("Cast", places, to=TensorProto.FLOAT), b.ints(1))
    angles = b.op("Mul", position, frequencies)
    return b.op("Cos", angles), b.op("Sin", angles)


def _linear(b: GraphBuilder, tiny: Tiny, x: str, k: int, n: int) -> str:
    y = b.op("MatMul", x, b.weight(k, n))
    return b.op("Add", b.near(0, n), y) if tiny.bias else y


def _split_heads(b: GraphBuilder, x: str, heads: int, head_dim: int) -> str:
    shaped = b.op("Reshape", x, b.ints(0, 0, heads, head_dim))
    return b.op("Transpose", shaped, perm=[0, 2, 1, 3])


def _repeat(b: GraphBuilder, tiny: Tiny, x: str, length: str) -> str:
    """(1, kv_heads, length, d) -> (1, heads, length, d), each head several times."""
    if tiny.kv_heads == tiny.heads:
        return x
    group = tiny.heads // tiny.kv_heads
    one, kv, d = b.ints(1), b.ints(tiny.kv_heads), b.ints(tiny.head_dim)
    shape = b.op("Concat", one, kv, b.ints(group), length, d, axis=0)
    wide = b.op("Expand", b.op("Unsqueeze", x, b.ints(2)), shape)
    flat = b.op("Concat", one, b.ints(tiny.heads), length, d, axis=0)
    return b.op("Reshape", wide, flat)


def _attention(
    b: GraphBuilder, tiny: Tiny, x: str, length: str, tables: tuple[str, str] | None
) -> str:
    d, width, kv_width = (
        tiny.head_dim,
        tiny.heads * tiny.head_dim,
        tiny.kv_heads * tiny.head_dim,
    )
    if tiny.packed_qkv == "heads":
        packed = _linear(b, tiny, x, tiny.hidden, 3 * width)
        shaped = b.op("Reshape", packed, b.ints(0, 0, tiny.heads, 3 * d))
        turned = b.op("Transpose", shaped, perm=[0, 2, 1, 3])
        q, k, v = b.ops("Split", turned, b.ints(d, d, d), outputs=3, axis=3)
    else:
        if tiny.packed_qkv:
            packed = _linear(b, tiny, x, tiny.hidden, width + 2 * kv_width)
            sizes = b.ints(width, kv_width, kv_width)
            q, k, v = b.ops("Split", packed, sizes, outputs=3, axis=2)
        else:
            q, k, v = (_linear(b, tiny, x, tiny.hidden, n) for n in (width, kv_width, kv_width))
        q = _split_heads(b, q, tiny.heads, d)
        k, v = (_split_heads(b, part, tiny.kv_heads, d) for part in (k, v))
    if tiny.qk_norm:
        q = _norm_heads(b, tiny, q, tiny.heads)
        k = _norm_heads(b, tiny, k, tiny.kv_heads)
    if tables is not None:
        rope, _, _ = ROPES[tiny.rope]
        q, k = (rope(b, part, *tables, d) for part in (q, k))
    k, v = _repeat(b, tiny, k, length), _repeat(b, tiny, v, length)
    k = b.op("Transpose", k, perm=[0, 1, 3, 2])
    scale = 1 / math.sqrt(d)
    if tiny.scale_on == "queries":
        q = b.op("Div", q, b.constant(math.sqrt(d)))
    elif tiny.scale_on == "both":
        q, k = (b.op("Mul", part, b.constant(math.sqrt(scale))) for part in (q, k))
    scores = b.op("MatMul", q, k)
    if tiny.scale_on == "scores":
        scores = b.op("Mul", scores, b.constant(scale))
    if tiny.softcap:
        capped = b.op("Tanh", b.op("Div", scores, b.constant(tiny.softcap)))
        scores = b.op("Mul", capped, b.constant(tiny.softcap))
    mask, _ = {**MASKS, **WINDOWS, **BIASES, **OTHER_MASKS}[tiny.mask]
    weights = b.op("Softmax", mask(b, scores, length), axis=-1)
    joined = b.op("Transpose", b.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    return _linear(b, tiny, b.op("Reshape", joined, b.ints(0, 0, width)), width, tiny.hidden)


def _norm_heads(b: GraphBuilder, tiny: Tiny, x: str, heads: int) -> str:
    """An RMS norm of each head of x (1, heads, n, head_dim), times a gamma for all or for each."""
    mean = b.op("ReduceMean", b.op("Pow", x, b.constant(2.0)), b.ints(-1))
    root = b.op("Sqrt", b.op("Add", mean, b.constant(1e-6)))
    shape = (heads, 1, tiny.head_dim) if tiny.qk_norm == "own" else (tiny.head_dim,)
    return b.op("Mul", b.near(1, *shape), b.op("Div", x, root))


def _mlp(b: GraphBuilder, tiny: Tiny, x: str) -> str:
    if tiny.block is not None:
        return tiny.block(b, x, tiny.hidden)
    known = {name: function for name, (function, _) in ACTIVATIONS.items()}
    activation = {**known, **OTHER_ACTIVATIONS}[tiny.activation]
    gate = activation(b, _linear(b, tiny, x, tiny.hidden, tiny.ffn))
    if tiny.activation.startswith("silu"):
        gate = b.op("Mul", gate, _linear(b, tiny, x, tiny.hidden, tiny.ffn))
    return _linear(b, tiny, gate, tiny.ffn, tiny.hidden)


def save(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    onnx.save(model, path)
    return path


def run_onnxruntime(path: Path, tokens: np.ndarray, output: str | None = None) -> np.ndarray:
    """The first (or the named) output of one sequence without a past, the graph not optimised."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {}
    for port in session.get_inputs():
        shape = [d if isinstance(d, int) else 0 for d in port.shape]
        if port.name.startswith("past"):
            batch = 1 if len(shape) == 5 else 0  # keys and values in one are (2, batch, ...)
            shape[batch] = 1
            feed[port.name] = np.zeros(shape, np.float32)
        elif port.name == "input_ids":
            dtype = np.int32 if port.type == "tensor(int32)" else np.int64
            feed[port.name] = np.asarray(tokens, dtype)[None]
        elif port.name == "position_ids":
            feed[port.name] = np.arange(len(tokens))[None]
        elif port.type == "tensor(bool)":
            feed[port.name] = np.zeros(shape, np.bool_)
        else:
            fill = 1 if "mask" in port.name else 0
            dtype = np.int32 if port.type == "tensor(int32)" else np.int64
            feed[port.name] = np.full((1, len(tokens)), fill, dtype)
    chosen = output or session.get_outputs()[0].name
    return session.run([chosen], feed)[0][0]
