"""Small transformers written node by node, in the spellings that exporters use.

Weights are random but of the size that keeps activations near one, so that a wrong import shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.importer.graph_builder import GraphBuilder
from tests.importer.spellings import (
    ACTIVATIONS,
    BIASES,
    CHUNKS,
    MASKS,
    NORMS,
    OTHER_ACTIVATIONS,
    OTHER_MASKS,
    PATTERNS,
    ROPES,
    WINDOWS,
)


@dataclass(frozen=True)
class Tiny:
    """A one- or two-layer decoder or encoder; every size is odd on purpose where it may be."""

    vocab: int = 53
    hidden: int = 24
    heads: int = 3
    kv_heads: int = 3
    repeated: str = "rotated"  # key heads, for the query heads that share them; or "first"
    head_dim: int = 8
    ffn: int = 37
    layers: int = 1
    norm: str = "rms_rsqrt"
    activation: str = "silu"
    rope: str = ""  # a key of ROPES
    learned_positions: int = 0  # rows of a learned table, 0 for none
    padding: int = -1  # a token that positions do not count; none where negative
    rope_base: float = 10000.0
    rope_grid: float = 0.0  # cosines and sines are rounded to multiples of it
    mask: str = "trilu"
    bias: bool = False
    scale_on: str = "scores"  # or "queries", "both": sqrt(scale) on queries and keys
    flat_heads: bool = False  # scores are a product of three dimensions, not of four
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
        at = count_positions(b, ids, tiny.padding) if tiny.padding >= 0 else places
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


def count_positions(b: GraphBuilder, ids: str, padding: int) -> str:
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
    tables = b.op("Cos", angles), b.op("Sin", angles)
    if not tiny.rope_grid:
        return tables
    grid = b.constant(tiny.rope_grid)
    cos, sin = (b.op("Mul", b.op("Round", b.op("Div", table, grid)), grid) for table in tables)
    return cos, sin


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
    if tiny.repeated == "first":
        k = _repeat(b, tiny, k, length)
    if tables is not None:
        rope, _, _ = ROPES[tiny.rope]
        q, k = (rope(b, part, *tables, d) for part in (q, k))
    if tiny.repeated == "rotated":
        k = _repeat(b, tiny, k, length)
    v = _repeat(b, tiny, v, length)
    k = b.op("Transpose", k, perm=[0, 1, 3, 2])
    scale = 1 / math.sqrt(d)
    if tiny.scale_on == "queries":
        q = b.op("Div", q, b.constant(math.sqrt(d)))
    elif tiny.scale_on == "both":
        q, k = (b.op("Mul", part, b.constant(math.sqrt(scale))) for part in (q, k))
    if tiny.flat_heads:
        q, k = (b.op("Squeeze", part, b.ints(0)) for part in (q, k))
    scores = b.op("MatMul", q, k)
    if tiny.flat_heads:
        scores = b.op("Unsqueeze", scores, b.ints(0))
    if tiny.scale_on == "scores":
        scores = b.op("Mul", scores, b.constant(scale))
    if tiny.softcap:
        capped = b.op("Tanh", b.op("Div", scores, b.constant(tiny.softcap)))
        scores = b.op("Mul", capped, b.constant(tiny.softcap))
    mask, _ = {**MASKS, **WINDOWS, **BIASES, **CHUNKS, **PATTERNS, **OTHER_MASKS}[tiny.mask]
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
