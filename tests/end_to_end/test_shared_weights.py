"""Layers that have some of their arrays in common, against onnxruntime: each computes with its own.

Tools that deduplicate initializers write such files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

import slmtvm
from slmtvm.compiler import compile_model
from tests.importer.graph_builder import GraphBuilder, run_onnxruntime, save
from tests.importer.spellings import mask_trilu

CONTEXT, VOCAB, HIDDEN, BLOCK = 24, 40, 48, 16
GROUPS = HIDDEN // BLOCK
TOKENS = np.random.default_rng(1).integers(0, VOCAB, CONTEXT)


def nbits(b: GraphBuilder, x: str) -> str:
    """Layers of one packed weight, which differ in scales, zero points or g_idx."""
    packed = b.constant(
        b.random.integers(0, 256, (HIDDEN, GROUPS, BLOCK // 2)), np.uint8, name="packed"
    )
    first, other = (
        b.constant(b.random.uniform(0.01, 0.05, (HIDDEN, GROUPS)), name=f"scales.{i}")
        for i in range(2)
    )
    zeros = [
        b.constant(b.random.integers(0, 256, (HIDDEN, 2)), np.uint8, name=f"zeros.{i}")
        for i in range(2)
    ]
    floats = b.constant(b.random.uniform(0, 15, (HIDDEN, GROUPS)), name="zeros.float")
    order = [
        b.constant(b.random.permutation(HIDDEN) // BLOCK, np.int32, name=f"order.{i}")
        for i in range(2)
    ]
    for scales, more in (
        (first, ()), (other, ()), (first, (zeros[0],)), (first, (zeros[1],)), (other, (zeros[1],)),
        (first, (floats,)), (first, ("", order[0])), (first, ("", order[1])),
    ):  # fmt: skip
        y = b.op(
            "MatMulNBits", x, packed, scales, *more, domain="com.microsoft",
            N=HIDDEN, K=HIDDEN, bits=4, block_size=BLOCK,
        )  # fmt: skip
        x = b.op("Add", x, y)
    return x


def dequantized(b: GraphBuilder, x: str) -> str:
    """Layers of one int8 weight, which differ in scales or zero points."""
    stored = b.constant(b.random.integers(-128, 128, (HIDDEN, HIDDEN)), np.int8, name="stored")
    for index, (seed, zero) in enumerate(((2, 0), (3, 0), (3, 5), (3, 6))):
        own = np.random.default_rng(seed).uniform(0.001, 0.003, HIDDEN)
        scales = b.constant(own, name=f"scales.{index}")
        zeros = b.constant(np.full(HIDDEN, zero), np.int8, name=f"zeros.{index}")
        weight = b.op("DequantizeLinear", stored, scales, zeros, axis=1)
        x = b.op("Add", x, b.op("MatMul", x, weight))
    return x


def one_scale(b: GraphBuilder, x: str) -> str:
    """Gated layers of several widths, all of whose weights have one scale in common."""
    scale = b.constant(0.002, name="scale")

    def linear(x: str, k: int, n: int) -> str:
        stored = b.constant(b.random.integers(-128, 128, (k, n)), np.int8)
        return b.op("MatMul", x, b.op("DequantizeLinear", stored, scale))

    for width in (24, 40):
        gate, up = (linear(x, HIDDEN, width) for _ in range(2))
        silu = b.op("Mul", gate, b.op("Sigmoid", gate))
        x = b.op("Add", x, linear(b.op("Mul", silu, up), width, HIDDEN))
    return x


def like_the_compilers_own(b: GraphBuilder, x: str) -> str:
    """Weights that are called what functions and state of a bundle are called."""
    for name in ("layer0.k_cache", "layer0.v_cache"):
        y = b.op("Add", b.op("MatMul", x, b.weight(HIDDEN, HIDDEN)), b.near(0, HIDDEN, name=name))
        x = b.op("Add", x, b.op("Tanh", y))
    x = b.op("LayerNormalization", x, b.near(1, HIDDEN, name="tokens"))
    x = b.op("Add", x, b.op("MatMul", x, b.weight(HIDDEN, HIDDEN)))
    return b.op("LayerNormalization", x, b.near(1, HIDDEN, name="hidden"))


def write(layers: Callable[[GraphBuilder, str], str], folder: Path) -> Path:
    """Attention, then the layers and a head."""
    b = GraphBuilder(np.random.default_rng(0))
    length = b.op("Shape", "input_ids", start=1, end=2)
    x = b.op("Gather", b.constant(b.random.normal(size=(VOCAB, HIDDEN))), "input_ids")
    q, k, v = (b.op("MatMul", x, b.weight(HIDDEN, HIDDEN)) for _ in range(3))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1]))
    weights = b.op("Softmax", mask_trilu(b, scores, length), axis=-1)
    x = layers(b, b.op("Add", x, b.op("MatMul", weights, v)))
    b.op("MatMul", x, b.weight(HIDDEN, VOCAB))
    b.nodes[-1].output[0] = "logits"
    model = b.model(
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", VOCAB])],
    )
    return save(model, folder)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [nbits, dequantized, one_scale, like_the_compilers_own])
def test_each_layer_computes_with_its_own_arrays(
    layers: Callable[[GraphBuilder, str], str], tmp_path: Path
) -> None:
    file, bundle = write(layers, tmp_path), tmp_path / "b.slm"
    compile_model(file, output=bundle, context=CONTEXT, kv="f32", activations="f32")
    wanted = run_onnxruntime(file, TOKENS)
    with slmtvm.load(bundle) as session:
        got = session.eval_all(TOKENS)
    assert np.abs(got - wanted).max() <= 2e-5 * np.ptp(wanted)


@pytest.mark.slow
def test_what_layers_have_in_common_is_stored_once(tmp_path: Path) -> None:
    bundle = tmp_path / "b.slm"
    compile_model(
        write(dequantized, tmp_path), output=bundle, context=CONTEXT, kv="f32", activations="f32"
    )
    floats = 4 * (VOCAB * HIDDEN + 3 * HIDDEN * HIDDEN + HIDDEN * VOCAB)
    # One weight for the four layers, and their scales and zero points.
    assert (bundle / "weights.bin").stat().st_size < floats + 2 * HIDDEN * HIDDEN + 4096
