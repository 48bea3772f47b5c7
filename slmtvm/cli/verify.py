"""Compare a bundle with onnxruntime on the ONNX file that it was compiled from."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from slmtvm.cli.arguments import add_place, add_threads, place, positive
from slmtvm.cli.files import write_text

DISAGREES = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle, x.slm")
    parser.add_argument("model", type=Path, help="the ONNX file")
    parser.add_argument(
        "--encoder", type=Path, metavar="FILE",
        help="the ONNX file of the encoder that a decoder's file reads (default: "
        "encoder_model.onnx beside it)",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--text", type=Path, metavar="FILE", help="compare on this text, with perplexity"
    )
    what.add_argument(
        "--tokens", type=Path, metavar="FILE",
        help="compare on the token ids of a .npy file, (n,) or (windows, n), with perplexity",
    )  # fmt: skip
    parser.add_argument("--windows", type=positive, help="only so many windows of the text")
    parser.add_argument(
        "--window", type=positive, default=256, help="tokens in a window (default 256)"
    )
    parser.add_argument(
        "--float", type=Path, metavar="FILE", dest="float_file",
        help="the ONNX file before it was quantized: show how far both are from it",
    )  # fmt: skip
    parser.add_argument(
        "--max-kl", type=float, default=0.01, metavar="NATS",
        help=f"exit code {DISAGREES} where a decoder's mean KL divergence is more (default 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--min-cosine", type=float, default=0.99, metavar="COSINE",
        help=f"exit code {DISAGREES} where the mean cosine is less (default 0.99)",
    )  # fmt: skip
    parser.add_argument(
        "--max-relative", type=float, default=0.2, metavar="SHARE",
        help=f"exit code {DISAGREES} where the largest difference is a larger share of the range "
        "of onnxruntime's values (default 0.2)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    add_threads(parser)
    parser.add_argument("--target", help="which of the bundle's libraries (default: the best here)")
    add_place(parser)


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from slmtvm.verify import Limits, verify
    from slmtvm.verify.token_files import read_ids, read_text

    limits = Limits(options.max_kl, options.min_cosine, options.max_relative)
    with tqdm(unit="window", leave=False, disable=options.quiet or None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = verify(
            options.bundle,
            options.model,
            encoder=options.encoder,
            text=read_text(options.text) if options.text else None,
            tokens=read_ids(options.tokens) if options.tokens else None,
            windows=options.windows,
            window=options.window,
            threads=options.threads,
            float_file=options.float_file,
            limits=limits,
            place=place(options),
            target=options.target,
            progress=show,
        )
    if not options.quiet:
        print(report)
    if options.json:
        text = json.dumps(report.to_json(), indent=2, allow_nan=False)
        write_text(options.json, f"{text}\n")
    if not (excess := report.excess(limits)):
        return 0
    print(
        f"slmtvm: the bundle differs from onnxruntime by more than allowed: {'; '.join(excess)}",
        file=sys.stderr,
    )
    return DISAGREES
