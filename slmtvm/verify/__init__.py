"""Bundles against onnxruntime on the ONNX file that they were compiled from."""

from slmtvm.verify.agreement import Figures, Limits
from slmtvm.verify.compare import compare, verify
from slmtvm.verify.greedy import GreedyComparison, compare_greedy
from slmtvm.verify.reference import Reference
from slmtvm.verify.report import VerifyReport
from slmtvm.verify.token_files import encode_text

__all__ = [
    "Figures",
    "GreedyComparison",
    "Limits",
    "Reference",
    "VerifyReport",
    "compare",
    "compare_greedy",
    "encode_text",
    "verify",
]
