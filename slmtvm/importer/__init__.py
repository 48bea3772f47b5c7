"""ONNX to the canonical model: load, freeze at fixed lengths, recognise, emit."""

from slmtvm.importer.importing import import_onnx, import_with_mask

__all__ = ["import_onnx", "import_with_mask"]
