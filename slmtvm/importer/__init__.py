"""ONNX to the canonical model: load, freeze at fixed lengths, recognise, emit."""

from slmtvm.importer.importing import import_onnx

__all__ = ["import_onnx"]
