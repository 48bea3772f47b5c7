"""Check that a bundle is signed by a trusted key, and that none of its files was changed."""

from __future__ import annotations

import argparse
from pathlib import Path

from slmtvm.cli.arguments import natural


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle, x.slm")
    parser.add_argument(
        "--pub", type=Path, action="append", required=True, metavar="FILE",
        help="public keys that are trusted, in PEM, one or more; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--least-counter", type=natural, default=0, metavar="N",
        help="the least counter that the release may have (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "--require", action="append", default=[], metavar="FIGURE",
        help='the accuracy that its check must have found, such as "kl<0.01" or "cosine>0.99"',
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from slmtvm.bundle.sign import check_accuracy, verify_signature
    from slmtvm.bundle.signature import PublicKeys

    bundle = verify_signature(
        options.bundle, PublicKeys.read(options.pub), least_counter=options.least_counter
    )
    for requirement in options.require:
        check_accuracy(bundle, requirement)
    if not options.quiet:
        release = bundle.manifest.release
        print(
            f"{bundle.path}: signed by a trusted key, version {release.version or '(none)'}, "
            f"counter {release.counter}; {len(bundle.files())} files are what was signed"
        )
    return 0
