"""Activations are computed in what was asked for; a bundle says where that is not the file's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import slmtvm
from slmtvm.inspect import inspect
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.quantized import matmul_nbits

TINY = Tiny(vocab=53, hidden=40, heads=4, kv_heads=2, head_dim=12, ffn=72, rope="rotate_half")
TOKENS = np.random.default_rng(0).integers(0, 53, 30)
LINEARS = 8
EXACT = 2e-4  # of the logits' range


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activations", "exact", "rounded"), [("int8", False, LINEARS), ("file", True, 0)]
)
def test_float_activations_are_exact_where_the_file_asks_for_them(
    activations: str, exact: bool, rounded: int, tmp_path: Path
) -> None:
    quantized = matmul_nbits(build(TINY), bits=4, block_size=16, is_symmetric=False)
    model, bundle = save(quantized, tmp_path), tmp_path / "x.slm"
    assert inspect(model).float_activation_layers == LINEARS
    slmtvm.compile(
        model, ["x86-64-v3"], output=bundle, context=32, kv="f32", activations=activations
    )
    report = slmtvm.verify(bundle, model, tokens=TOKENS)
    span = np.ptp(run_onnxruntime(model, TOKENS))
    assert (report.max_abs < EXACT * span) == exact
    assert report.rounded_layers == rounded
    assert ("--activations file" in str(report)) == bool(rounded)
