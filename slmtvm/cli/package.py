"""Put a bundle into a package for devices."""

from __future__ import annotations

import argparse
from pathlib import Path

from slmtvm.cli.arguments import add_signer, signer

_FORMATS = ("tar.gz", "deb", "oci", "wheel")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle, x.slm")
    parser.add_argument("--format", choices=_FORMATS, default="tar.gz", help="default: tar.gz")
    parser.add_argument(
        "--target", action="append", metavar="NAME",
        help="one of the bundle's targets (default: the only one); for oci it may be given several "
        "times, and the default is all",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="the package's file; for wheel, its folder"
    )
    parser.add_argument(
        "--name",
        dest="model_name",
        help="the model's name on devices (default: that of the bundle's folder)",
    )
    parser.add_argument(
        "--license", metavar="SPDX", help="the weights' licence, such as Apache-2.0"
    )
    parser.add_argument(
        "--maintainer", metavar="NAME", help="who answers for a deb: 'Your Name <you@example.org>'"
    )
    parser.add_argument(
        "--pub", type=Path, action="append", metavar="FILE",
        help="public keys, by one of which the bundle must be signed",
    )  # fmt: skip
    add_signer(parser, required=False)


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from slmtvm.bundle.signature import PublicKeys
    from slmtvm.packaging import package

    with tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=options.quiet or None) as bar:
        path = package(
            options.bundle,
            options.format,
            options.output,
            target=options.target,
            name=options.model_name,
            license=options.license,
            maintainer=options.maintainer,
            signer=signer(options),
            pub=PublicKeys.read(options.pub) if options.pub else None,
            progress=bar.set_description_str,
        )
    if not options.quiet:
        print(f"{path}: {options.format}")
    return 0
