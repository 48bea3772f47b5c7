"""Encrypt a bundle's weights; sign it afterwards."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle, x.slm")
    parser.add_argument(
        "--weights-key", required=True, metavar="SOURCE",
        help="where the key comes from, 32 bytes or 64 hexadecimal digits: file:PATH, fd:NUMBER, "
        "keyring:NAME or command:COMMAND, which writes it to its standard output",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="the encrypted bundle, y.slm"
    )


def run(options: argparse.Namespace) -> int:
    from slmtvm.bundle.encrypt import encrypt_bundle
    from slmtvm.bundle.weights_key import read_weights_key

    bundle = encrypt_bundle(options.bundle, read_weights_key(options.weights_key), options.output)
    if not options.quiet:
        print(f"{bundle.path}: {bundle.manifest.weights.bytes} bytes of encrypted weights")
    return 0
