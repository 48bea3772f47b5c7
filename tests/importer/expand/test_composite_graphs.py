"""Whole models of composite operators, as optimizers and ONNX's operator set 23 have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import GraphBuilder, run_onnxruntime, save
from tests.importer.test_import_spellings import calls_of, op_names

MICROSOFT = "com.microsoft"
VOCAB, HIDDEN, HEADS, FFN, LAYERS = 53, 24, 3, 37, 2
KV_HEADS = 1
HEAD_DIM = HIDDEN // HEADS
CONTEXT, TOKENS = 48, 40
TOLERANCE = 1e-4  # of the outputs' range


def info(name: str, kind: int, *dims: object) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def ids(name: str, *dims: object) -> onnx.ValueInfoProto:
    return info(name, TensorProto.INT64, *(dims or ("batch", "seq")))


def imported(model: onnx.ModelProto, folder: Path) -> CanonicalModel:
    """The model imported and compared with onnxruntime on random tokens."""
    path = save(model, folder)
    result = import_onnx(path, context=CONTEXT)
    tokens = np.random.default_rng(1).integers(0, VOCAB, TOKENS)
    want = run_onnxruntime(path, tokens)
    assert np.abs(evaluate(result, tokens) - want).max() <= TOLERANCE * np.ptp(want)
    return result


def skip_norm(b: GraphBuilder, x: str, y: str) -> str:
    """BERT's: the norm of the sum."""
    gamma, beta, bias = b.near(1, HIDDEN), b.near(0, HIDDEN), b.near(0, HIDDEN)
    return b.op("SkipLayerNormalization", x, y, gamma, beta, bias, domain=MICROSOFT, epsilon=1e-5)


def feed_forward(b: GraphBuilder, x: str, activation: str) -> str:
    y = b.op("FusedMatMul", x, b.weight(FFN, HIDDEN), domain=MICROSOFT, transB=1)
    y = b.op(activation, y, b.near(0, FFN), domain=MICROSOFT)
    return b.op("MatMul", y, b.weight(FFN, HIDDEN))


def packed_attention(b: GraphBuilder, x: str, mask: str) -> str:
    weights, bias = b.weight(HIDDEN, 3 * HIDDEN), b.near(0, 3 * HIDDEN)
    return b.op("Attention", x, weights, bias, mask, domain=MICROSOFT, num_heads=HEADS)


def rounded_attention(b: GraphBuilder, x: str, mask: str) -> str:
    levels, scale, zero = b.ops("DynamicQuantizeLinear", x, outputs=3)
    weight = b.constant(b.random.integers(-127, 127, (HIDDEN, 3 * HIDDEN)), np.int8)
    return b.op(
        "QAttention", levels, weight, b.near(0, 3 * HIDDEN), scale, b.constant(0.003), mask, zero,
        b.constant(0, np.int8), domain=MICROSOFT, num_heads=HEADS,
    )  # fmt: skip


def separate_attention(b: GraphBuilder, x: str, mask: str) -> str:
    q, k, v = (b.op("MatMul", x, b.weight(HIDDEN, HIDDEN)) for _ in range(3))
    bias = b.near(0, 3 * HIDDEN)
    return b.op("MultiHeadAttention", q, k, v, bias, mask, domain=MICROSOFT, num_heads=HEADS)


def encoder(
    attention: Callable[[GraphBuilder, str, str], str], mask: str, activation: str
) -> onnx.ModelProto:
    """A BERT as onnxruntime's optimizer leaves it."""
    b = GraphBuilder(np.random.default_rng(0))
    tables = [b.near(0, n, HIDDEN) for n in (VOCAB, 64, 2)]
    norm = (b.near(1, HIDDEN), b.near(0, HIDDEN))
    lengths = "attention_mask" if mask == "lengths" else ""
    x, index, _ = b.ops(
        "EmbedLayerNormalization", "input_ids", "token_type_ids", *tables, *norm, lengths,
        outputs=3, domain=MICROSOFT, epsilon=1e-5,
    )  # fmt: skip
    given = {
        "tokens": b.op("Cast", "attention_mask", to=TensorProto.INT32),
        "lengths": index,
        "none": "",
    }[mask]
    for _ in range(LAYERS):
        y = b.op("MatMul", attention(b, x, given), b.weight(HIDDEN, HIDDEN))
        x = skip_norm(b, x, y)
        x = skip_norm(b, x, feed_forward(b, x, activation))
    b.nodes[-1].output[0] = "last_hidden_state"
    inputs = [ids("input_ids"), ids("token_type_ids"), ids("attention_mask")]
    for port in inputs:
        port.type.tensor_type.elem_type = TensorProto.INT32
    return b.model(inputs, [info("last_hidden_state", TensorProto.FLOAT, "batch", "seq", HIDDEN)])


@pytest.mark.parametrize("activation", ["BiasGelu", "FastGelu"])
@pytest.mark.parametrize("mask", ["tokens", "lengths", "none"])
@pytest.mark.parametrize("attention", [packed_attention, separate_attention])
def test_an_optimized_encoder_has_the_ops_of_a_plain_one(attention, mask, activation, tmp_path):
    model = imported(encoder(attention, mask, activation), tmp_path)
    names = op_names(model)
    assert model.kind == "encoder" and model.family == "bert"
    assert names.count("slm.linear") == 6 * LAYERS
    assert names.count("slm.layer_norm") == 2 * LAYERS + 1
    assert names.count("relax.nn.gelu_tanh" if activation == "FastGelu" else "relax.nn.gelu") == 2
    assert {str(c.attrs["mask"]) for c in calls_of(model, "slm.attention")} == {"bidirectional"}


def test_an_attention_on_rounded_rows_keeps_its_int8_weights(tmp_path):
    model = imported(encoder(rounded_attention, "lengths", "BiasGelu"), tmp_path)
    formats = [str(c.attrs["format"]) for c in calls_of(model, "slm.linear")]
    assert formats.count("int8") == 3 * LAYERS


def gpt2(*, stacked: bool) -> onnx.ModelProto:
    """A decoder with a past, (2, batch, heads, past, head_dim) where ``stacked``."""
    b = GraphBuilder(np.random.default_rng(0))
    x = b.op("Gather", b.near(0, VOCAB, HIDDEN, name="embedding"), "input_ids")
    x = b.op("Add", x, b.op("Gather", b.near(0, 64, HIDDEN), "position_ids"))
    mask = b.op("Cast", "attention_mask", to=TensorProto.INT32)
    pasts = []
    for layer in range(LAYERS):
        norm = b.op("LayerNormalization", x, b.near(1, HIDDEN), b.near(0, HIDDEN), epsilon=1e-5)
        weights, bias = b.weight(HIDDEN, 3 * HIDDEN), b.near(0, 3 * HIDDEN)
        if stacked:
            pasts.append((f"past_{layer}", (2, "batch", HEADS, "past", HEAD_DIM)))
            y, _ = b.ops(
                "Attention", norm, weights, bias, mask, f"past_{layer}", outputs=2,
                domain=MICROSOFT, num_heads=HEADS, unidirectional=1,
            )  # fmt: skip
        else:
            names = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
            pasts += [(name, ("batch", HEADS, "past", HEAD_DIM)) for name in names]
            packed = b.op("MatMul", norm, weights)
            q, k, v = b.ops("Split", packed, b.ints(*(HIDDEN,) * 3), outputs=3, axis=2)
            y, *_ = b.ops(
                "MultiHeadAttention", q, k, v, bias, mask, "", *names, outputs=3,
                domain=MICROSOFT, num_heads=HEADS, unidirectional=1,
            )  # fmt: skip
        x = b.op("Add", x, b.op("MatMul", y, b.weight(HIDDEN, HIDDEN)))
        norm = b.op("LayerNormalization", x, b.near(1, HIDDEN), b.near(0, HIDDEN), epsilon=1e-5)
        x = b.op("Add", x, feed_forward(b, norm, "FastGelu"))
    b.op("FusedMatMul", x, "embedding", domain=MICROSOFT, transB=1)
    b.nodes[-1].output[0] = "logits"
    inputs = [ids("input_ids"), ids("position_ids"), ids("attention_mask", "batch", "total")]
    inputs += [info(name, TensorProto.FLOAT, *dims) for name, dims in pasts]
    return b.model(inputs, [info("logits", TensorProto.FLOAT, "batch", "seq", VOCAB)])


@pytest.mark.parametrize("stacked", [True, False])
def test_an_optimized_decoder_has_the_ops_of_a_plain_one(stacked, tmp_path):
    result = imported(gpt2(stacked=stacked), tmp_path)
    assert result.kind == "decoder" and len(result.kv) == LAYERS
    assert op_names(result).count("slm.linear") == 6 * LAYERS + 1
    head = calls_of(result, "slm.linear")[-1]
    assert head.args[1].same_as(calls_of(result, "slm.embedding")[0].args[1])


def opset_23(*, by_head: bool, interleaved: int, softcap: float) -> onnx.ModelProto:
    """A Llama in ONNX's own composite operators."""
    b = GraphBuilder(np.random.default_rng(0))
    half = HEAD_DIM // 2
    angles = np.arange(64)[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = b.constant(np.cos(angles)), b.constant(np.sin(angles))
    x = b.op("Gather", b.weight(VOCAB, HIDDEN), "input_ids")
    for _ in range(LAYERS):
        norm = b.op("RMSNormalization", x, b.near(1, HIDDEN), epsilon=1e-5, axis=-1)
        parts = []
        for heads in (HEADS, KV_HEADS, KV_HEADS):
            part = b.op("MatMul", norm, b.weight(HIDDEN, heads * HEAD_DIM))
            if by_head:
                part = b.op("Reshape", part, b.ints(0, 0, heads, HEAD_DIM))
                part = b.op("Transpose", part, perm=[0, 2, 1, 3])
            parts.append(part)
        attrs = [{} if by_head else {"num_heads": heads} for heads in (HEADS, KV_HEADS)]
        q, k = (
            b.op("RotaryEmbedding", p, cos, sin, "position_ids", interleaved=interleaved, **a)
            for p, a in zip(parts, attrs, strict=False)
        )
        counts = {} if by_head else {"q_num_heads": HEADS, "kv_num_heads": KV_HEADS}
        y = b.op("Attention", q, k, parts[2], is_causal=1, softcap=softcap, **counts)
        if by_head:
            y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), b.ints(0, 0, HIDDEN))
        x = b.op("Add", x, b.op("MatMul", y, b.weight(HIDDEN, HIDDEN)))
    norm = b.op("RMSNormalization", x, b.near(1, HIDDEN), epsilon=1e-5, axis=-1)
    b.op("MatMul", norm, b.weight(HIDDEN, VOCAB))
    b.nodes[-1].output[0] = "logits"
    model = b.model(
        [ids("input_ids"), ids("position_ids")],
        [info("logits", TensorProto.FLOAT, "batch", "seq", VOCAB)],
    )
    model.opset_import[0].version = 23
    model.ir_version = 11
    return model


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize(("interleaved", "softcap"), [(0, 0.0), (1, 0.0), (0, 1.5)])
def test_a_decoder_of_operator_set_23_becomes_that_of_primitives(
    by_head, interleaved, softcap, tmp_path
):
    model = imported(opset_23(by_head=by_head, interleaved=interleaved, softcap=softcap), tmp_path)
    assert op_names(model).count("slm.rope") == 2 * LAYERS
    for call in calls_of(model, "slm.rope"):
        assert bool(call.attrs["interleaved"]) == bool(interleaved)
    for call in calls_of(model, "slm.attention"):
        assert int(call.attrs["num_kv_heads"]) == KV_HEADS
        assert float(call.attrs["softcap"]) == pytest.approx(softcap)
        assert str(call.attrs["mask"]) == "causal"
