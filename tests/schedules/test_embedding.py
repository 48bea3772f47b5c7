"""Embedding kernels return the table's rows exactly as the file means them."""

from __future__ import annotations

import numpy as np
import pytest

from slmtvm.schedules import embedding, isa, linear, packed_embedding
from slmtvm.schedules.embedding import EmbeddingOp
from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.linear import LinearShape
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.harness import run
from tests.schedules.linear_cases import FLOATS, random_case

VOCAB = 11

OPS = [
    EmbeddingOp(3, VOCAB, 33, "f32"),
    EmbeddingOp(3, VOCAB, 31, "f16"),
    EmbeddingOp(3, VOCAB, 96, "int8", scale_shape=(1,)),
    EmbeddingOp(3, VOCAB, 70, "int8", "uint8", (VOCAB,), zero_points=True),
    EmbeddingOp(3, VOCAB, 33, "bf16"),
    EmbeddingOp(3, VOCAB, 96, "int8", "int8", (VOCAB, 3), zero_points=True, group_size=32),
    EmbeddingOp(3, VOCAB, 70, "int8", "int8", (VOCAB, 3), zero_points=True, group_size=32),
    EmbeddingOp(3, VOCAB, 30, "int4", scale_shape=(VOCAB,)),
    EmbeddingOp(3, VOCAB, 256, "int4", scale_shape=(VOCAB, 8), zero_points=True, group_size=32),
    EmbeddingOp(3, VOCAB, 41, "int4", scale_shape=(VOCAB, 3), zero_points=True, group_size=16),
    EmbeddingOp(3, VOCAB, 33, "int4", scale_shape=(VOCAB, 7), zero_points=True, group_size=5),
    EmbeddingOp(3, VOCAB, 41, "int2", scale_shape=(VOCAB, 3), zero_points=True, group_size=16),
    EmbeddingOp(3, VOCAB, 70, "int2", scale_shape=(VOCAB, 7), group_size=10),
    EmbeddingOp(3, VOCAB, 33, "int16", scale_shape=(VOCAB,), zero_points=True),
    EmbeddingOp(3, VOCAB, 70, "int4", scale_shape=(4, 70), zero_points=True, group_channels=3),
    EmbeddingOp(3, VOCAB, 33, "int8", scale_shape=(1, 33), group_channels=16),
    EmbeddingOp(3, VOCAB, 33, "e4m3fn", scale_shape=(1,)),
    EmbeddingOp(3, VOCAB, 70, "e5m2", scale_shape=(VOCAB, 6), group_size=12),
]


def random_tensor(tensor: Tensor, rng: np.random.Generator) -> np.ndarray:
    if tensor.name == "tokens":
        return rng.integers(0, VOCAB, tensor.shape, np.int32)
    if tensor.name == "zero_points" and tensor.dtype == "uint8":
        return rng.integers(0, 4, tensor.shape, np.uint8)
    if tensor.dtype == "float16":
        # Every finite pattern is as likely as any other: subnormal numbers and zeros too.
        bits = rng.integers(0, 1 << 16, tensor.shape, np.uint16)
        bits[(bits & 0x7C00) == 0x7C00] = 0x8001
        return bits.view(np.float16)
    if tensor.dtype == "float32":
        return rng.standard_normal(tensor.shape).astype(np.float32)
    limits = np.iinfo(tensor.dtype)
    return rng.integers(limits.min, limits.max + 1, tensor.shape).astype(tensor.dtype)


@pytest.mark.parametrize("target_name", EVERY_TARGET)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_an_embedding_is_the_dequantized_row(op: EmbeddingOp, target_name: str) -> None:
    rng = np.random.default_rng(0)
    inputs = {t.name: random_tensor(t, rng) for t in op.inputs}
    if op.format in FLOATS:
        inputs["table"] = rng.standard_normal((VOCAB, op.dim)).astype(FLOATS[op.format])
        inputs["table"] = inputs["table"].view(op.inputs[1].dtype)
    got = run(embedding.build(op), inputs, Target.load(target_name), cuts=(2,))["y"]
    np.testing.assert_array_equal(got, embedding.reference(op, inputs))


@pytest.mark.parametrize("target_name", EVERY_TARGET)
@pytest.mark.parametrize(
    "shape",
    [
        LinearShape(3, 37, 33, "f32", has_bias=True),
        LinearShape(3, 37, 33, "f16"),
        LinearShape(3, 37, 33, "bf16", has_residual=True),
        LinearShape(3, 37, 70, "int8", "row_u8"),
        LinearShape(3, 37, 61, "int8", "row_u8", has_zero_points=True),
        LinearShape(3, 37, 61, "int8", has_zero_points=True),
        LinearShape(3, 37, 70, "int8", "block", 32, scale_dtype="float16"),
        LinearShape(3, 37, 77, "int4", "block", 32, has_zero_points=True),
        LinearShape(3, 37, 96, "int4", group_size=16, scale_dtype="float16"),
        LinearShape(3, 37, 45, "int2", "block", 16, has_zero_points=True),
        LinearShape(3, 37, 45, "int4", group_size=6, has_zero_points=True),
        LinearShape(3, 37, 61, "int8", group_size=10),
    ],
    ids=lambda shape: shape.kernel_name("", {}),
)
def test_a_row_of_a_packed_layer_is_that_row_dequantized(
    shape: LinearShape, target_name: str
) -> None:
    target = Target.load(target_name)
    own = isa.get(target.isa)
    case = random_case(shape, own)
    _, w = case.operands()
    packed = linear.pack(shape, own, linear.Weights(**case.weights))
    tokens = np.array([36, 0, 17], np.int32)
    names = [t.name for t in packed_embedding.operands(shape, own)]
    inputs = {"tokens": tokens, **{name: packed[name] for name in names}}
    got = run(packed_embedding.build(shape, own), inputs, target, cuts=(2,))["y"]
    # One product of float32 numbers, rounded once: what float64 holds exactly.
    np.testing.assert_array_equal(got, w[tokens].astype(np.float32))
