"""Pruned weights are recognised, whatever holds them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from slmtvm.importer import import_onnx
from slmtvm.importer.emit.sparsity import sparsity_of
from slmtvm.importer.recognise.steps import Param, Weights
from slmtvm.inspect import inspect
from tests.importer.graph_builder import save
from tests.importer.graphs import Tiny, build
from tests.importer.quantized import matmul_nbits

TINY = Tiny(hidden=40, heads=4, kv_heads=2, head_dim=12, ffn=72, vocab=53, rope="rotate_half")


def pruned(n: int, m: int, rows: int = 30, k: int = 41) -> np.ndarray:
    """Random weights (rows, k) with n of every m neighbours left."""
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 2, (rows, k)).astype(np.float32)
    whole = values[:, : k // m * m].reshape(rows, -1, m)
    order = rng.permuted(np.broadcast_to(np.arange(m), whole.shape), axis=2)
    whole[order >= n] = 0
    return values


@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (4, 8), (3, 4)], ids=str)
@pytest.mark.parametrize("format", ["f32", "f16", "bf16", "e4m3fn", "int8"])
def test_a_pattern_is_named(pattern, format):
    dtypes = {"f32": "f4", "f16": "f2", "bf16": ml_dtypes.bfloat16, "int8": "i1",
              "e4m3fn": ml_dtypes.float8_e4m3fn}  # fmt: skip
    values = pruned(*pattern).astype(dtypes[format])
    stored = values.view({"bf16": np.uint16, "e4m3fn": np.uint8}.get(format, values.dtype))
    expected = "" if pattern == (3, 4) else f"{pattern[0]}:{pattern[1]}"
    assert sparsity_of(Weights(format, Param("w", stored)), 41) == expected


def test_one_row_that_is_dense_makes_the_weight_dense():
    values = pruned(2, 4, rows=1500)
    values[1400] = 1
    assert sparsity_of(Weights("f32", Param("w", values)), 41) == ""


@pytest.mark.parametrize("symmetric", [True, False])
def test_inspect_says_which_quantized_layers_are_pruned(symmetric, tmp_path):
    model = build(TINY)
    head = next(t for t in model.graph.initializer if t.name == "head.weight")
    head.raw_data = np.ascontiguousarray(pruned(2, 4, 53, 40).T).tobytes()
    quantized = matmul_nbits(model, bits=4, block_size=16, is_symmetric=symmetric)
    path = save(quantized, tmp_path)
    layers = [la for la in import_onnx(path, context=32).layers if la.kind == "linear"]
    assert [la.sparsity for la in layers] == [""] * 7 + ["2:4"]
    assert "int4 group 16 2:4" in str(inspect(path))
