"""Generate text with a compiled bundle."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from slmtvm.cli.arguments import add_threads, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle, x.slm")
    parser.add_argument(
        "--prompt", required=True, help="the text to continue, or an encoder-decoder's source"
    )
    parser.add_argument(
        "--start", type=int, metavar="ID",
        help="the token that an encoder-decoder's text starts from (default: what the "
        "model's settings say, or padding)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=positive, default=64, help="most tokens to generate (default 64)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token"
    )
    parser.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, default=0.0, help="only the likeliest tokens of this probability"
    )
    parser.add_argument("--seed", type=int, help="makes a random choice repeatable")
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    from slmtvm.runtime import load
    from slmtvm.runtime.text import generate_text

    with load(options.bundle, threads=options.threads, cores=options.cores) as session:
        started = time.perf_counter()
        pieces = generate_text(
            session,
            options.prompt,
            options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            start=options.start,
        )
        if session.info["kind"] == "decoder":
            sys.stdout.write(options.prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
        seconds = time.perf_counter() - started
        if not options.quiet:
            print(f"[{session.position} tokens in {seconds:.2f} s]", file=sys.stderr)
    return 0
