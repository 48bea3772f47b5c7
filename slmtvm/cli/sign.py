"""Sign a bundle, with a key's file or by a command."""

from __future__ import annotations

import argparse
from pathlib import Path

from slmtvm.cli.arguments import add_signer, natural, signer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle, x.slm")
    add_signer(parser, required=True)
    parser.add_argument(
        "--counter", type=natural, metavar="N",
        help="the release's counter, more than that of the one before: devices take none that is "
        "less (default: what the bundle has, 0 at first)",
    )  # fmt: skip
    parser.add_argument(
        "--version", metavar="V", dest="release", help="the release's version, such as 1.2.0"
    )
    parser.add_argument(
        "--bench", type=Path, metavar="FILE",
        help="what slmtvm bench --json wrote on a device, for the manifest to state",
    )  # fmt: skip
    parser.add_argument(
        "--bench-kind", choices=("board", "emulated", "modelled"), default="board",
        help="what the speed was found on (default: board)",
    )  # fmt: skip
    parser.add_argument(
        "--pub", type=Path, action="append", metavar="FILE",
        help="public keys, one of which must accept the signature",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from slmtvm.bundle.sign import sign_bundle
    from slmtvm.bundle.signature import PublicKeys
    from slmtvm.bundle.speed import read_speed

    sign = signer(options)
    assert sign is not None  # the parser asks for one
    bundle = sign_bundle(
        options.bundle,
        sign,
        counter=options.counter,
        version=options.release,
        speed=read_speed(options.bench, options.bench_kind) if options.bench else None,
        pub=PublicKeys.read(options.pub) if options.pub else None,
    )
    if not options.quiet:
        release = bundle.manifest.release
        print(
            f"{bundle.path}: signed, version {release.version or '(none)'}, "
            f"counter {release.counter}"
        )
    return 0
