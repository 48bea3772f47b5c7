"""A model for tests of quantized weights, and what they all ask of its import."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import run_onnxruntime
from tests.importer.graphs import Tiny

# No size is a multiple of a block, and the head's rows are odd in number.
TINY = Tiny(hidden=40, heads=4, kv_heads=2, head_dim=12, ffn=72, vocab=53, rope="rotate_half")
TOKENS = np.array([3, 50, 7, 7, 21, 0, 52, 11, 30, 4, 4, 19])
TOLERANCE = 2e-4


def matmul_nbits(model: onnx.ModelProto, **options) -> onnx.ModelProto:
    quantizer = MatMulNBitsQuantizer(model, **options)
    quantizer.process()
    return quantizer.model.model


def check(path: Path, tokens: np.ndarray = TOKENS) -> CanonicalModel:
    model = import_onnx(path, context=32)
    want = run_onnxruntime(path, tokens)
    got = evaluate(model, tokens)
    assert np.abs(got - want).max() <= TOLERANCE * np.ptp(want)
    return model


def nibbles(rng: np.random.Generator, shape: tuple[int, ...], signed: bool) -> onnx.TensorProto:
    kind = TensorProto.INT4 if signed else TensorProto.UINT4
    raw = rng.integers(0, 256, -(-math.prod(shape) // 2), dtype=np.uint8).tobytes()
    return helper.make_tensor("", kind, shape, raw, raw=True)
