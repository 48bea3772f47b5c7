"""Make a pair of Ed25519 keys to sign bundles and packages with."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "private", type=Path, help="the private key's file (PEM), which only you may read: key.pem"
    )
    parser.add_argument(
        "--pub", type=Path, metavar="FILE",
        help="the public key's file, for devices (default: pub.pem beside the private one)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from slmtvm.bundle.signature import generate_keys

    public = options.pub or options.private.with_name("pub.pem")
    generate_keys(options.private, public)
    if not options.quiet:
        print(f"{options.private}: the private key; keep it where no device and nobody else is")
        print(f"{public}: the public key, for devices")
    return 0
