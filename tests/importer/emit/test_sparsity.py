"""Pruned weights are recognised, whatever holds them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from slmtvm.importer import import_onnx
from slmtvm.importer.emit.sparsity import sparsity_of
from slmtvm.importer.recognise.steps import Param, Weights
from slmtvm.inspect import inspect
from slmtvm.schedules.linear.packed_rows import pack_rows
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


@pytest.mark.parametrize("pattern", [(1, 4), (2, 8), (2, 4), (4, 8), (3, 4)], ids=str)
@pytest.mark.parametrize("format", ["f32", "f16", "bf16", "e4m3fn", "int8"])
def test_a_pattern_is_named(pattern, format):
    dtypes = {"f32": "f4", "f16": "f2", "bf16": ml_dtypes.bfloat16, "int8": "i1",
              "e4m3fn": ml_dtypes.float8_e4m3fn}  # fmt: skip
    values = pruned(*pattern).astype(dtypes[format])
    stored = values.view({"bf16": np.uint16, "e4m3fn": np.uint8}.get(format, values.dtype))
    expected = "" if pattern == (3, 4) else f"{pattern[0]}:{pattern[1]}"
    assert sparsity_of(Weights(format, Param("w", stored)), 41).pattern == expected


def test_one_row_that_is_dense_breaks_a_pattern_of_neighbours():
    values = pruned(2, 4, rows=1500)
    values[1400] = 1
    found = sparsity_of(Weights("f32", Param("w", values)), 41)
    assert found.pattern == "unstructured"
    assert found.zeros == pytest.approx((values == 0).mean())


def with_zero_blocks(rows: int, columns: int, share: float = 0.7, n: int = 96) -> np.ndarray:
    """Random int8 weights (n, 72), of whose blocks so many are zero."""
    rng = np.random.default_rng(rows * 40 + columns)
    values = rng.integers(1, 100, (n, 72)).astype(np.int8)
    zero = rng.random((-(-n // rows), -(-72 // columns))) < share
    values[np.repeat(np.repeat(zero, rows, axis=0), columns, axis=1)[:n, :72]] = 0
    return values


@pytest.mark.parametrize(
    "block", [(32, 4), (32, 1), (16, 1), (8, 4), (4, 4), (4, 1), (1, 4)], ids=str
)
@pytest.mark.parametrize("zero_points", [False, True])
def test_blocks_are_named_by_channels_and_inputs(block, zero_points):
    values = with_zero_blocks(*block)
    given = {}
    if zero_points:
        zeros = np.random.default_rng(1).integers(-20, 20, 96).astype(np.int8)
        values += zeros[:, None]
        given["zero_points"] = Param("z", zeros)
    found = sparsity_of(Weights("int8", Param("w", values), **given), 72)
    assert found.pattern == f"{block[0]}x{block[1]}"
    assert found.zeros == pytest.approx(0.7, abs=0.1)


def test_channels_and_inputs_without_weights_are_named_however_few():
    values = np.random.default_rng(0).integers(1, 100, (96, 72)).astype(np.int8)
    rows, columns = values.copy(), values.copy()
    rows[24:30] = 0
    columns[:, 7] = 0
    assert sparsity_of(Weights("int8", Param("w", rows)), 72).pattern == "rows"
    assert sparsity_of(Weights("int8", Param("w", columns)), 72).pattern == "columns"
    assert sparsity_of(Weights("int8", Param("w", rows * 0)), 72).pattern == "rows"
    assert sparsity_of(Weights("int8", Param("w", values)), 72).pattern == ""


def test_blocks_that_kernels_skip_are_counted():
    values = with_zero_blocks(8, 4)
    used = sparsity_of(Weights("int8", Param("w", values)), 72).used
    split = values.reshape(12, 8, 18, 4)
    assert used["8x4"] == pytest.approx(split.any(axis=(1, 3)).mean())
    assert used["32x1"] == pytest.approx(values.reshape(3, 32, 72).any(axis=1).mean())


def test_zeros_that_rounding_makes_are_no_pattern():
    rng = np.random.default_rng(0)
    values = np.clip(np.round(rng.standard_normal((64, 64)) * 2.5) + 8, 0, 15).astype(np.uint8)
    packed = values[:, ::2] | values[:, 1::2] << 4
    assert sparsity_of(Weights("int4", Param("w", packed)), 64).pattern == ""


@pytest.mark.parametrize("symmetric", [True, False])
def test_inspect_says_which_quantized_layers_are_pruned(symmetric, tmp_path):
    model = build(TINY)
    head = next(t for t in model.graph.initializer if t.name == "head.weight")
    head.raw_data = np.ascontiguousarray(pruned(2, 4, 53, 40).T).tobytes()
    quantized = matmul_nbits(model, bits=4, block_size=16, is_symmetric=symmetric)
    path = save(quantized, tmp_path)
    layers = [la for la in import_onnx(path, context=32).layers if la.kind == "linear"]
    assert [la.sparsity for la in layers] == [""] * 7 + ["2:4"]
    text = str(inspect(path))
    assert "int4 group 16 2:4" in text
    assert "int4, 2:4, 50% zeros: computed as dense: kernels take groups of 32 or more" in text


@pytest.mark.parametrize(
    ("size", "zero", "top", "fits"), [(32, None, 7, 1), (32, 5, 2, 1), (32, 0, 8, 0), (16, 5, 2, 0)]
)
def test_int4_weights_of_pairs_are_known_to_fit_once_zero_points_are_off(size, zero, top, fits):
    values = np.where(pruned(2, 4, 96, 64) > 0, top, 0) + (8 if zero is None else zero)
    zeros = None if zero is None else Param("z", np.full((96, 64 // size), zero, np.uint8))
    stored = Param("w", pack_rows(values.astype(np.uint8), 4))
    found = sparsity_of(Weights("int4", stored, zero_points=zeros, group_size=size), 64)
    assert found.pattern == "2:4" and found.windows == ("2of4",) * fits
