"""Compare a bundle with onnxruntime on the ONNX file that it was compiled from."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from slmtvm.cli.arguments import add_threads, positive
from slmtvm.cli.files import write_text
from slmtvm.errors import SlmError

DISAGREES = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle, x.slm")
    parser.add_argument("model", type=Path, help="the ONNX file")
    parser.add_argument(
        "--encoder", type=Path, metavar="FILE",
        help="the ONNX file of the encoder that a decoder's file reads (default: "
        "encoder_model.onnx beside it)",
    )  # fmt: skip
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="compare on this text, with perplexity"
    )
    parser.add_argument("--windows", type=positive, help="only so many windows of the text")
    parser.add_argument(
        "--window", type=positive, default=256, help="tokens in a window (default 256)"
    )
    parser.add_argument(
        "--max-kl", type=float, default=0.01, metavar="NATS",
        help=f"exit code {DISAGREES} where a decoder's mean KL divergence is more (default 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--min-cosine", type=float, default=0.99, metavar="COSINE",
        help=f"exit code {DISAGREES} where an encoder's mean cosine is less (default 0.99)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from slmtvm.verify import verify

    text = _read(options.text) if options.text else None
    with tqdm(unit="window", leave=False, disable=options.quiet or None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = verify(
            options.bundle,
            options.model,
            encoder=options.encoder,
            text=text,
            windows=options.windows,
            window=options.window,
            threads=options.threads,
            progress=show,
        )
    if not options.quiet:
        print(report)
    if options.json:
        write_text(options.json, json.dumps(report.to_json(), indent=2) + "\n")
    if report.agrees(max_kl=options.max_kl, min_cosine=options.min_cosine):
        return 0
    print("slmtvm: the bundle differs from onnxruntime by more than allowed", file=sys.stderr)
    return DISAGREES


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()  # no newline is translated: it is one more token or less
    except (OSError, UnicodeDecodeError) as error:
        raise SlmError(f"not a readable UTF-8 text: {error}", where=str(path)) from error
