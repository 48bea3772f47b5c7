"""Quantize the linear layers of an ONNX file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from slmtvm.cli.arguments import positive
from slmtvm.cli.reports import show_report

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the ONNX file, in float")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the quantized ONNX file")
    parser.add_argument(
        "--bits", default="4", choices=("4", "8", "mixed"),
        help="of a weight; mixed keeps 8 where that saves the most error (default 4)",
    )  # fmt: skip
    parser.add_argument(
        "--group", type=positive, default=32, metavar="N",
        help="weights that share a scale: 16 to 256 (default 32)",
    )  # fmt: skip
    parser.add_argument("--symmetric", action="store_true", help="without zero points")
    parser.add_argument(
        "--method", default="rtn", metavar="NAME",
        help="rtn (default), k-quant, gptq, awq or hqq; dynamic or static for int8 with quantized "
        "activations",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="a text, or token ids in a .npy file; needed by gptq, awq and static, and for errors "
        "of outputs and perplexities",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.json for the text (default: the model's own)"
    )
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN",
        help="shell patterns of nodes or weights to leave as they are",
    )  # fmt: skip
    parser.add_argument(
        "--embeddings", action="store_true", help="write embedding tables in 4 bits as well"
    )
    parser.add_argument(
        "--size", type=_bytes, metavar="BYTES", help="what mixed aims at, such as 6MB"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from slmtvm.quantize import quantize

    with tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=options.quiet or None) as bar:
        report = quantize(
            options.model,
            options.output,
            bits=options.bits if options.bits == "mixed" else int(options.bits),
            group=options.group,
            symmetric=options.symmetric,
            method=options.method,
            calibration=options.calibration,
            tokenizer=options.tokenizer,
            exclude=options.exclude,
            embeddings=options.embeddings,
            size=options.size,
            progress=bar.set_description_str,
        )
    show_report(report, options)
    return 0


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, such as 6MB")
    return int(float(found[1]) * _UNITS[found[2]])
