"""Bundles against onnxruntime on the ONNX file that they were compiled from."""

from slmtvm.verify.compare import compare, encode_text, verify
from slmtvm.verify.greedy import GreedyComparison, compare_greedy
from slmtvm.verify.reference import Reference
from slmtvm.verify.report import VerifyReport

__all__ = [
    "GreedyComparison",
    "Reference",
    "VerifyReport",
    "compare",
    "compare_greedy",
    "encode_text",
    "verify",
]
