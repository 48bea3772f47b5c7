"""Files of the corpus that do not import yet, or differ from onnxruntime, by what is missing."""

from __future__ import annotations

GAPS: dict[str, tuple[str, ...]] = {}


def reason(file: str) -> str:
    """Why a file <cell>/<name>.onnx does not pass; empty where it does."""
    name = file.removesuffix("/model.onnx")
    return next((why for why, names in GAPS.items() if name in names), "")
