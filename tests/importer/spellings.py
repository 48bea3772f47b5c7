"""The spellings in which exporters write norms, activations, rotary embeddings and masks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from tests.importer.graph_builder import GraphBuilder

MASK_VALUE = np.float32(np.finfo(np.float32).min)

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


def rope_operator(b: GraphBuilder, x: str, cos: str, sin: str, d: int) -> str:
    """onnxruntime's operator on all features, beside what is left of them: none."""
    number = b.op("Squeeze", b.op("Shape", cos, start=0, end=1))
    places = b.op("Range", b.constant(0, np.int64), number, b.constant(1, np.int64))
    rotated, passed = _sliced(b, x, 0, d), _sliced(b, x, d, 1 << 62)
    at = b.op("Unsqueeze", places, b.ints(0))
    turned = b.op("RotaryEmbedding", rotated, at, cos, sin, domain="com.microsoft", interleaved=0)
    return b.op("Concat", turned, passed, axis=-1)


ROPES: dict[str, tuple[Callable[..., str], int, bool]] = {
    # name: (function, fraction of the head that is rotated is 1 / n, interleaved)
    "rotate_half": (rope_rotate_half, 1, False),
    "split_halves": (rope_split_halves, 1, False),
    "interleaved": (rope_interleaved, 1, True),
    "partial": (rope_partial, 2, False),
    "operator": (rope_operator, 1, False),
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


def mask_both_chunked(b: GraphBuilder, scores: str, length: str) -> str:
    """The same without an order."""
    places, _ = _distances(b, length)
    block = b.op("Div", places, b.constant(10, np.int64))
    same = b.op("Equal", b.op("Unsqueeze", block, b.ints(1)), block)
    return b.op("Where", same, scores, b.constant(MASK_VALUE))


def mask_uneven(b: GraphBuilder, scores: str, length: str) -> str:
    """Blocks of ten, but for the last position of the second one, which is in the third."""
    places, _ = _distances(b, length)
    early = b.op("Cast", b.op("Equal", places, b.constant(19, np.int64)), to=TensorProto.INT64)
    block = b.op("Div", b.op("Add", places, early), b.constant(10, np.int64))
    same = b.op("Equal", b.op("Unsqueeze", block, b.ints(1)), block)
    return mask_trilu(b, b.op("Where", same, scores, b.constant(MASK_VALUE)), length)


def mask_padded(b: GraphBuilder, scores: str, length: str) -> str:
    """The first two positions hidden from those after them."""
    places, _ = _distances(b, length)
    first = b.op("Less", places, b.constant(2, np.int64))
    late = b.op("Unsqueeze", b.op("GreaterOrEqual", places, b.constant(2, np.int64)), b.ints(1))
    hidden = b.op("Where", b.op("And", first, late), b.constant(-1e30), scores)
    return mask_trilu(b, hidden, length)


def mask_global(b: GraphBuilder, scores: str, length: str) -> str:
    """Longformer's pattern: neighbours up to six away, two tokens that see all and are seen."""
    places, distance = _distances(b, length)
    near = b.op("LessOrEqual", b.op("Abs", distance), b.constant(6, np.int64))
    first = b.op("Less", places, b.constant(2, np.int64))
    seen = b.op("Or", b.op("Or", near, first), b.op("Unsqueeze", first, b.ints(1)))
    return b.op("Where", seen, scores, b.constant(MASK_VALUE))


def mask_of_heads(b: GraphBuilder, scores: str, length: str) -> str:
    """BigBird's pattern: blocks of eight see their own, and those of a table of each head."""
    places, _ = _distances(b, length)
    block = b.op("Div", places, b.constant(8, np.int64))
    table = np.random.default_rng(5).random((3, 20, 20)) < 0.2
    table |= np.eye(20, dtype=bool)
    rows = b.op("Gather", b.constant(table, bool), block, axis=1)
    seen = b.op("Gather", rows, block, axis=2)
    return b.op("Where", seen, scores, b.constant(-np.inf))


def mask_blind(b: GraphBuilder, scores: str, length: str) -> str:
    """Two positions that do not see themselves."""
    places, distance = _distances(b, length)
    own = b.op("Equal", distance, b.constant(0, np.int64))
    early = b.op("Less", places, b.constant(2, np.int64))
    hidden = b.op("And", own, early)
    return b.op("Where", hidden, b.constant(MASK_VALUE), scores)


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


def bias_in_steps(b: GraphBuilder, scores: str, length: str) -> str:
    """ALiBi as BLOOM has it, in whole steps: not the same for all pairs of one distance, and 0 in
    short sequences."""
    places, _ = _distances(b, length)
    slopes = b.constant([[[0.13]], [[0.09]], [[0.05]]])
    bias = b.op("Floor", b.op("Mul", slopes, b.op("Cast", places, to=TensorProto.FLOAT)))
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


BUCKETS = 32  # as T5 has by default


def bias_by_causal_bucket(b: GraphBuilder, scores: str, length: str) -> str:
    """T5's decoder: half of the buckets hold one distance each, the others are logarithmic."""
    _, away = _distances(b, length)
    half, zero, one = (b.constant(n, np.int64) for n in (BUCKETS // 2, 0, 1))
    distance = b.op("Max", away, zero)
    ratio = b.op("Cast", b.op("Max", distance, one), to=TensorProto.FLOAT)
    ratio = b.op("Div", ratio, b.constant(BUCKETS // 2))
    steps = b.op("Mul", b.op("Log", ratio), b.constant(BUCKETS // 2 / math.log(8)))
    far = b.op("Add", b.op("Cast", steps, to=TensorProto.INT64), half)
    far = b.op("Min", far, b.constant(BUCKETS - 1, np.int64))
    bucket = b.op("Where", b.op("Less", distance, half), distance, far)
    picked = b.op("Gather", b.near(0, BUCKETS, 3), bucket)
    bias = b.op("Unsqueeze", b.op("Transpose", picked, perm=[2, 0, 1]), b.ints(0))
    return mask_trilu(b, b.op("Add", scores, bias), length)


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
    "in_steps": (bias_in_steps, "causal"),
    "by_distance": (bias_by_distance, "causal"),
    "by_bucket": (bias_by_bucket, "bidirectional"),
    "by_causal_bucket": (bias_by_causal_bucket, "causal"),
}
CHUNKS = {"chunked": (mask_chunked, "causal"), "both_chunked": (mask_both_chunked, "bidirectional")}
PATTERNS = {
    "both_ways": (bias_both_ways, "bidirectional"),
    "uneven": (mask_uneven, "causal"),
    "padded": (mask_padded, "causal"),
    "global": (mask_global, "bidirectional"),
    "of_heads": (mask_of_heads, "bidirectional"),
}
OTHER_MASKS = {
    "blind": (mask_blind, "the mask hides position 0 from itself"),
    "of_length": (mask_of_length, "the mask changes with the length of the sequence"),
}
