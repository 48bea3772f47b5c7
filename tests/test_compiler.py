"""Compiling an ONNX file: what is refused before any work is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmtvm.compiler import compile_model
from slmtvm.errors import SlmError


def test_an_unknown_kind_of_activations_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SlmError, match="activations: must be one of int8, file, f32, not 'f16'"):
        compile_model(tmp_path / "none.onnx", output=tmp_path / "x.slm", activations="f16")
    assert not list(tmp_path.iterdir())


def test_an_unknown_kind_of_kv_cache_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SlmError, match="kv: must be one of f16, f32, int8, int4, not 'f8'"):
        compile_model(tmp_path / "none.onnx", output=tmp_path / "x.slm", kv="f8")
    assert not list(tmp_path.iterdir())
