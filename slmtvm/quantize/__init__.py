"""Quantizing an ONNX file with onnxruntime's quantizers: ``slmtvm quantize``."""

from slmtvm.quantize.quantizing import METHODS, quantize
from slmtvm.quantize.report import QuantizeReport

__all__ = ["METHODS", "QuantizeReport", "quantize"]
