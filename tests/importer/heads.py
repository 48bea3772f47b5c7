"""A small encoder and a small decoder under the heads that task models have, node by node."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from tests.importer.graph_builder import GraphBuilder, save

VOCAB, DIM, HEADS, FFN, MOST, LABELS, PAD, START, END = 61, 24, 3, 40, 64, 3, 1, 5, 2
SEGMENTS, TYPES = "token_type_ids", 2
_TABLE, _PAIRS, _PAST = "embedding.weight", "attention_bias", "past_key_values.0.key"
_Outputs = dict[str, tuple[str, list[str | int]]]  # name -> its value and its dimensions


def _linear(b: GraphBuilder, x: str, k: int, n: int) -> str:
    return b.op("Add", b.op("MatMul", x, b.weight(k, n)), b.near(0, n))


def _gemm(b: GraphBuilder, x: str, k: int, n: int) -> str:
    return b.op("Gemm", x, b.weight(k, n), b.near(0, n))


def _norm(b: GraphBuilder, x: str) -> str:
    return b.op("LayerNormalization", x, b.near(1, DIM), b.near(0, DIM), axis=-1)


def _attention(b: GraphBuilder, x: str, read: str, bias: str) -> str:
    """Attention of the rows ``x`` over the rows ``read``."""

    def heads(value: str, perm: list[int]) -> str:
        shaped = b.op("Reshape", value, b.ints(0, -1, HEADS, DIM // HEADS))
        return b.op("Transpose", shaped, perm=perm)

    q, k, v = (_linear(b, rows, DIM, DIM) for rows in (x, read, read))
    scores = b.op("MatMul", heads(q, [0, 2, 1, 3]), heads(k, [0, 2, 3, 1]))
    scores = b.op("Add", b.op("Div", scores, b.constant(math.sqrt(DIM / HEADS))), bias)
    mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), heads(v, [0, 2, 1, 3]))
    joined = b.op("Reshape", b.op("Transpose", mixed, perm=[0, 2, 1, 3]), b.ints(0, -1, DIM))
    return _norm(b, b.op("Add", x, _linear(b, joined, DIM, DIM)))


def _layer(b: GraphBuilder, x: str, bias: str, read: str = "") -> str:
    """A layer, which also attends to the rows ``read`` where there are any."""
    x = _attention(b, x, x, bias)
    if read:
        x = _attention(b, x, read, b.constant(0.0))
    up = b.op("Relu", _linear(b, x, DIM, FFN))
    return _norm(b, b.op("Add", x, _linear(b, up, FFN, DIM)))


def _body(b: GraphBuilder, causal: bool, types: str, chunk: int = 0, pairs: bool = False) -> str:
    b.constant(b.random.normal(size=(VOCAB, DIM)), name=_TABLE)
    x, places = _embedded(b, "input_ids")
    if types == "table":
        x = b.op("Add", x, b.op("Gather", b.near(0, TYPES, DIM), SEGMENTS))
    elif types:
        x = b.op("Add", x, b.op("Unsqueeze", b.op("Cast", SEGMENTS, to=1), b.ints(2)))
    seen = b.op("Unsqueeze", b.op("Cast", "attention_mask", to=TensorProto.FLOAT), b.ints(1, 2))
    bias = b.op("Mul", b.op("Sub", b.constant(1.0), seen), b.constant(-1e9))
    if causal:
        bias = b.op("Min", bias, _later(b, places))
    if chunk:
        of_chunk = b.op("Div", places, b.constant(chunk, np.int64))
        rows, columns = (b.op("Unsqueeze", of_chunk, b.ints(axis)) for axis in (1, 0))
        other = b.op("Not", b.op("Equal", rows, columns))
        bias = b.op("Where", other, b.constant(-1e9), bias)
    if pairs:
        bias = _PAIRS
    return _layer(b, _norm(b, x), bias)


def _embedded(b: GraphBuilder, tokens: str) -> tuple[str, str]:
    """Rows of tokens and of their places; and these places."""
    length = b.op("Gather", b.op("Shape", "input_ids"), b.constant(1, np.int64))
    places = b.op("Range", b.constant(0, np.int64), length, b.constant(1, np.int64))
    x = b.op("Gather", _TABLE, tokens)
    return b.op("Add", x, b.op("Gather", b.near(0, MOST, DIM), places)), places


def _later(b: GraphBuilder, places: str) -> str:
    """What hides later places from earlier ones."""
    rows, columns = (b.op("Unsqueeze", places, b.ints(axis)) for axis in (1, 0))
    later = b.op("Cast", b.op("Less", rows, columns), to=TensorProto.FLOAT)
    return b.op("Mul", later, b.constant(-1e9))


def _first(b: GraphBuilder, x: str) -> str:
    return b.op("Gather", x, b.constant(0, np.int64), axis=1)


def classifier(b: GraphBuilder, x: str) -> _Outputs:
    pooled = b.op("Tanh", _gemm(b, _first(b, x), DIM, DIM))
    return {"logits": (_gemm(b, pooled, DIM, LABELS), [LABELS])}


def normed_classifier(b: GraphBuilder, x: str) -> _Outputs:
    """A slice, its axis squeezed, a norm and an activation between two layers, as ModernBERT."""
    first = b.op("Squeeze", b.op("Slice", x, b.ints(0), b.ints(1), b.ints(1)), b.ints(1))
    mixed = _norm(b, b.op("Relu", b.op("MatMul", first, b.weight(DIM, DIM))))
    return {"logits": (_linear(b, mixed, DIM, LABELS), [LABELS])}


def regression(b: GraphBuilder, x: str) -> _Outputs:
    return {"logits": (_gemm(b, b.op("Relu", _gemm(b, _first(b, x), DIM, DIM)), DIM, 1), [1])}


def probability(b: GraphBuilder, x: str) -> _Outputs:
    return {"score": (b.op("Sigmoid", _gemm(b, _first(b, x), DIM, 1)), [1])}


def _keep(b: GraphBuilder) -> str:
    return b.op("Unsqueeze", b.op("Cast", "attention_mask", to=TensorProto.FLOAT), b.ints(2))


def _mean(b: GraphBuilder, x: str) -> str:
    keep = b.op("Expand", _keep(b), b.op("Shape", x))
    total = b.op("ReduceSum", b.op("Mul", x, keep), b.ints(1), keepdims=0)
    count = b.op("Clip", b.op("ReduceSum", keep, b.ints(1), keepdims=0), b.constant(1e-9))
    return b.op("Div", total, count)


def _unit(b: GraphBuilder, x: str) -> str:
    size = b.op("Clip", b.op("ReduceL2", x, b.ints(1), keepdims=1), b.constant(1e-12))
    return b.op("Div", x, b.op("Expand", size, b.op("Shape", x)))


def mean_embedding(b: GraphBuilder, x: str) -> _Outputs:
    return {"sentence_embedding": (_unit(b, _mean(b, x)), [DIM])}


def mean_by_product(b: GraphBuilder, x: str) -> _Outputs:
    """A product of the mask with all rows, over its sum."""
    row = b.op("Unsqueeze", b.op("Cast", "attention_mask", to=TensorProto.FLOAT), b.ints(1))
    total = b.op("Squeeze", b.op("MatMul", row, x), b.ints(1))
    return {"embedding": (b.op("Div", total, b.op("ReduceSum", row, b.ints(2), keepdims=0)), [DIM])}


def max_embedding(b: GraphBuilder, x: str) -> _Outputs:
    hidden = b.op("Equal", _keep(b), b.constant(0.0))
    most = b.op("ReduceMax", b.op("Where", hidden, b.constant(-1e9), x), b.ints(1), keepdims=0)
    return {"embedding": (most, [DIM])}


def max_of_written_over(b: GraphBuilder, x: str) -> _Outputs:
    """The greatest, after hidden rows were written over by their places."""
    hidden = b.op("Equal", "attention_mask", b.constant(0, np.int64))
    places = b.op("Transpose", b.op("NonZero", hidden), perm=[1, 0])
    count = b.op("Slice", b.op("Shape", places), b.ints(0), b.ints(1))
    least = b.op("Expand", b.constant(-1e9), b.op("Concat", count, b.ints(DIM), axis=0))
    most = b.op("ReduceMax", b.op("ScatterND", x, places, least), b.ints(1), keepdims=0)
    return {"embedding": (most, [DIM])}


def tokens_and_embedding(b: GraphBuilder, x: str) -> _Outputs:
    """Rows beside their mean after a dense layer, its first features alone, of length 1."""
    dense = b.op("Tanh", _gemm(b, _mean(b, x), DIM, DIM))
    cut = b.op("Slice", dense, b.ints(0), b.ints(8), b.ints(1))
    unit = b.op("LpNormalization", cut, axis=1, p=2)
    return {"sentence_embedding": (unit, [8]), "token_embeddings": (x, ["seq", DIM])}


def pooler(b: GraphBuilder, x: str) -> _Outputs:
    pooled = b.op("Tanh", _gemm(b, _first(b, x), DIM, DIM))
    return {"pooler_output": (pooled, [DIM]), "last_hidden_state": (x, ["seq", DIM])}


def both_poolings(b: GraphBuilder, x: str) -> _Outputs:
    both = b.op("Concat", _first(b, x), _mean(b, x), axis=-1)
    return {"embedding": (_gemm(b, both, 2 * DIM, 5), [5])}


def rows(b: GraphBuilder, x: str) -> _Outputs:
    """Rows of tokens alone, which modules beside the file make an embedding of."""
    return {"token_embeddings": (x, ["seq", DIM])}


def span(b: GraphBuilder, x: str) -> _Outputs:
    start, end = b.ops("Split", _linear(b, x, DIM, 2), b.ints(1, 1), outputs=2, axis=2)
    return {
        "start_logits": (b.op("Squeeze", start, b.ints(2)), ["seq"]),
        "end_logits": (b.op("Squeeze", end, b.ints(2)), ["seq"]),
    }


def twice(b: GraphBuilder, x: str) -> _Outputs:
    """One value under two names."""
    return {"a": (x, ["seq", DIM]), "b": (b.op("Identity", x), ["seq", DIM])}


def last_of_all(b: GraphBuilder, x: str) -> _Outputs:
    last = b.op("Gather", x, b.constant(-1, np.int64), axis=1)
    return {"embedding": (last, [DIM])}


def last_logits(b: GraphBuilder, x: str) -> _Outputs:
    """The logits of the last token alone, its axis kept: logits_to_keep = 1."""
    last = b.op("Slice", x, b.ints(-1), b.ints(2**31), b.ints(1))
    return {"logits": (b.op("MatMul", last, b.weight(DIM, VOCAB)), [1, VOCAB])}


def score_of_last_not_padding(b: GraphBuilder, x: str) -> _Outputs:
    """Scores of all rows, of which the last one that is no padding is taken."""
    scores = b.op("MatMul", x, b.weight(DIM, LABELS))
    text = b.op("Cast", b.op("Not", b.op("Equal", "input_ids", b.constant(PAD, np.int64))), to=6)
    length = b.op("Gather", b.op("Shape", "input_ids"), b.constant(1, np.int64))
    places = b.op("Range", b.constant(0, np.int64), length, b.constant(1, np.int64))
    marked = b.op("Mul", b.op("Cast", places, to=6), text)
    return {"logits": (_picked(b, scores, b.op("ArgMax", marked, axis=-1, keepdims=0)), [LABELS])}


def score_before_first_padding(b: GraphBuilder, x: str) -> _Outputs:
    """The same by where padding begins, and by the remainder where there is none."""
    scores = b.op("MatMul", x, b.weight(DIM, LABELS))
    pads = b.op("Cast", b.op("Equal", "input_ids", b.constant(PAD, np.int64)), to=6)
    first = b.op("ArgMax", pads, axis=-1, keepdims=0)
    length = b.op("Gather", b.op("Shape", "input_ids"), b.constant(1, np.int64))
    last = b.op("Mod", b.op("Sub", first, b.constant(1, np.int64)), length)
    return {"logits": (_picked(b, scores, last), [LABELS])}


def _picked(b: GraphBuilder, scores: str, place: str) -> str:
    """scores[arange(batch), place]"""
    batch = b.op("Gather", b.op("Shape", "input_ids"), b.constant(0, np.int64))
    row = b.op("Range", b.constant(0, np.int64), batch, b.constant(1, np.int64))
    index = b.op("Concat", *(b.op("Unsqueeze", v, b.ints(-1)) for v in (row, place)), axis=-1)
    return b.op("GatherND", scores, index)


def _decoded(b: GraphBuilder, x: str, first: str) -> _Outputs:
    """A decoder that reads the same tokens, moved by one behind ``first``, and the rows ``x``;
    labels of its row at the last end token."""
    before = b.op("Slice", "input_ids", b.ints(0), b.ints(-1), b.ints(1))
    rows, places = _embedded(b, b.op("Concat", first, before, axis=1))
    y = _layer(b, _norm(b, rows), _later(b, places), read=x)
    ends = b.op("NonZero", b.op("Equal", "input_ids", b.constant(END, np.int64)))
    found = b.op("GatherND", y, b.op("Transpose", ends, perm=[1, 0]))
    batch = b.op("Slice", b.op("Shape", "input_ids"), b.ints(0), b.ints(1))
    by_text = b.op("Reshape", found, b.op("Concat", batch, b.ints(-1, DIM), axis=0))
    last = b.op("Gather", by_text, b.constant(-1, np.int64), axis=1)
    return {"logits": (_gemm(b, b.op("Tanh", _gemm(b, last, DIM, DIM)), DIM, LABELS), [LABELS])}


def classifier_by_both_halves(b: GraphBuilder, x: str) -> _Outputs:
    """As BART's: the decoder starts with a token of the model."""
    batch = b.op("Slice", b.op("Shape", "input_ids"), b.ints(0), b.ints(1))
    shape = b.op("Concat", batch, b.ints(1), axis=0)
    return _decoded(b, x, b.op("Expand", b.constant([[START]], np.int64), shape))


def classifier_that_wraps_around(b: GraphBuilder, x: str) -> _Outputs:
    """As mBART's: the decoder starts with the last token that is no padding."""
    text = b.op("Not", b.op("Equal", "input_ids", b.constant(PAD, np.int64)))
    count = b.op("ReduceSum", b.op("Cast", text, to=TensorProto.INT64), b.ints(1), keepdims=1)
    last = b.op("Sub", count, b.constant(1, np.int64))
    return _decoded(b, x, b.op("GatherElements", "input_ids", last, axis=1))


def logits_and_value(b: GraphBuilder, x: str) -> _Outputs:
    """Logits, a number for each token from a layer of its own, and what both are made of."""
    value = b.op("Squeeze", _linear(b, x, DIM, 1), b.ints(2))
    logits = b.op("MatMul", x, b.weight(DIM, VOCAB))
    return {
        "logits": (logits, ["seq", VOCAB]),
        "value": (value, ["seq"]),
        "hidden": (x, ["seq", DIM]),
    }


@dataclass(frozen=True)
class Head:
    """A head, and the names of its outputs that are pooled; the first is what is meant.

    ``causal``: tokens see only those before them, with a ``chunk`` only those of their own chunk of
    so many; ``pairs``: what they see is an input.
    """

    build: Callable[[GraphBuilder, str], _Outputs]
    outputs: tuple[str, ...]
    pooled: frozenset[str] = frozenset()
    causal: bool = False
    chunk: int = 0
    pairs: bool = False


def _head(
    build: Callable[[GraphBuilder, str], _Outputs],
    outputs: str,
    pooled: str = "",
    causal: bool = False,
) -> Head:
    return Head(build, tuple(outputs.split()), frozenset(pooled.split()), causal)


ENCODERS = {
    head.build.__name__: head
    for head in (
        _head(classifier, "logits", "logits"),
        _head(normed_classifier, "logits", "logits"),
        _head(regression, "logits", "logits"),
        _head(probability, "score", "score"),
        _head(mean_embedding, "sentence_embedding", "sentence_embedding"),
        _head(mean_by_product, "embedding", "embedding"),
        _head(max_embedding, "embedding", "embedding"),
        _head(max_of_written_over, "embedding", "embedding"),
        _head(tokens_and_embedding, "token_embeddings sentence_embedding", "sentence_embedding"),
        _head(pooler, "last_hidden_state pooler_output", "pooler_output"),
        _head(both_poolings, "embedding", "embedding"),
        _head(last_of_all, "embedding", "embedding"),
        _head(span, "start_logits end_logits"),
        _head(twice, "a b"),
    )
}
# Of texts that end with END.
BOTH_HALVES = {
    head.build.__name__: head
    for head in (
        _head(classifier_by_both_halves, "logits", "logits"),
        _head(classifier_that_wraps_around, "logits", "logits"),
    )
}
# What is pooled of all tokens, of which each sees only those before it.
CAUSAL_ENCODERS = {
    name: Head(ENCODERS[name].build, ENCODERS[name].outputs, ENCODERS[name].pooled, causal=True)
    for name in ("mean_embedding", "max_embedding", "tokens_and_embedding", "pooler", "classifier")
}
# Of which modules beside the file make an embedding.
ROWS = Head(rows, ("token_embeddings",))
CAUSAL_ROWS = Head(rows, ("token_embeddings",), causal=True)
MASKED_DECODERS = {
    "chunks": Head(logits_and_value, ("logits", "value"), causal=True, chunk=6),
    "chunks_of_one_context": Head(logits_and_value, ("logits", "value"), causal=True, chunk=900),
    "pairs": Head(logits_and_value, ("logits", "value"), pairs=True),
}
DECODERS = {
    head.build.__name__: head
    for head in (
        _head(last_logits, "logits", "logits", causal=True),
        _head(last_of_all, "embedding", "embedding", causal=True),
        _head(score_of_last_not_padding, "logits", "logits", causal=True),
        _head(score_before_first_padding, "logits", "logits", causal=True),
        _head(logits_and_value, "logits value", causal=True),
    )
}


def save_modules(folder: Path, pooling: str, layers: str, seed: int = 0) -> list[dict]:
    """A sentence-transformer's modules.json and folders: a pooling by its name there, and layers
    such as "Dense:Tanh LayerNorm Normalize"; what each layer has of weights."""
    random, width, made = np.random.default_rng(seed), DIM, []
    entries = [("Transformer", ""), ("Pooling", "1_Pooling")]
    entries += [(name, f"{i}_{name.partition(':')[0]}") for i, name in enumerate(layers.split(), 2)]
    for name, place in entries[1:]:
        kind, _, activation = name.partition(":")
        (folder / place).mkdir()
        settings: dict = {f"pooling_mode_{pooling}": True} if kind == "Pooling" else {}
        tensors = {}
        if kind == "Dense":
            settings = {"activation_function": f"torch.nn.modules.activation.{activation}"}
            size = width + 5
            tensors = {
                "linear.weight": random.normal(size=(size, width)).astype(np.float32) / 4,
                "linear.bias": random.normal(size=size).astype(np.float32),
            }
            width = size
        elif kind == "LayerNorm":
            draw = random.normal(size=(2, width)).astype(np.float32)
            tensors = {"norm.weight": draw[0] + 1, "norm.bias": draw[1]}
        (folder / place / "config.json").write_text(json.dumps(settings))
        if tensors:
            save_file(tensors, folder / place / "model.safetensors")
        made.append({"kind": kind, "activation": activation, **tensors})
    listing = [
        {"idx": i, "path": place, "type": f"sentence_transformers.models.{name.partition(':')[0]}"}
        for i, (name, place) in enumerate(entries)
    ]
    (folder / "modules.json").write_text(json.dumps(listing))
    return made


def save_head(head: Head, folder: Path, seed: int = 0, types: str = "") -> Path:
    """The model under ``head``: input_ids and attention_mask int64 (batch, seq) -> its outputs.

    ``types``: it takes token types too, which choose rows of a "table", or are added as "numbers".
    """
    b = GraphBuilder(np.random.default_rng(seed))
    outputs = head.build(b, _body(b, head.causal, types, head.chunk, head.pairs))
    ports = []
    for name, (value, dims) in outputs.items():
        b.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        ports.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *dims]))
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"])
        for name in ("input_ids", "attention_mask", *([SEGMENTS] if types else []))
    ]
    if head.pairs:
        for name, dims in ((_PAIRS, [1, "seq", "total"]), (_PAST, [HEADS, "past", DIM // HEADS])):
            dims = ["batch", *dims]
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    model: onnx.ModelProto = b.model(inputs, ports)
    return save(model, folder)
