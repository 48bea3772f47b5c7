"""Set weights of an ONNX file to zero, in patterns that kernels skip."""

from __future__ import annotations

import argparse
from pathlib import Path

from slmtvm.cli.reports import show_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the ONNX file, in float; quantize it afterwards")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the pruned ONNX file")
    parser.add_argument(
        "--pattern", default="2:4", metavar="P",
        help="n:m (2:4, the default, 4:8, 1:4), block:CHANNELSxK (block:8x4) or free",
    )  # fmt: skip
    parser.add_argument(
        "--structured", metavar="WHAT",
        help="heads or channels, as a whole and instead of a pattern: compilers cut them out",
    )  # fmt: skip
    parser.add_argument(
        "--sparsity", type=float, metavar="PART",
        help="of the weights, heads or channels that go (default 0.5; n:m says it itself)",
    )  # fmt: skip
    parser.add_argument(
        "--method", default="sparsegpt", metavar="NAME",
        help="sparsegpt (default), wanda or magnitude",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="a text, or token ids in a .npy file; needed but by magnitude, and for perplexities",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.json for the text (default: the model's own)"
    )
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN",
        help="shell patterns of nodes or weights to leave as they are",
    )  # fmt: skip
    parser.add_argument(
        "--keep-dense", type=float, default=0.0, metavar="PART",
        help="of all weights, in the layers that would lose most (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, metavar="TIMES",
        help="the layers that would lose most stay dense until the perplexity is at most so many "
        "times that of before (1.1; needs a calibration text)",
    )  # fmt: skip
    parser.add_argument(
        "--head", action="store_true", help="prune the layer that makes the output as well"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from slmtvm.prune import prune

    with tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=options.quiet or None) as bar:
        report = prune(
            options.model,
            options.output,
            pattern=options.pattern,
            sparsity=options.sparsity,
            method=options.method,
            calibration=options.calibration,
            tokenizer=options.tokenizer,
            exclude=options.exclude,
            keep_dense=options.keep_dense,
            budget=options.budget,
            head=options.head,
            structured=options.structured,
            progress=bar.set_description_str,
        )
    show_report(report, options)
    return 0
