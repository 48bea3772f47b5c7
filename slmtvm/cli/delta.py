"""Write an update that carries only what changed between two packages."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path, help="the tar.gz package that devices have")
    parser.add_argument("new", type=Path, help="the signed tar.gz package that they shall have")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the delta's file")


def run(options: argparse.Namespace) -> int:
    from slmtvm.packaging.delta import write_delta

    path = write_delta(options.old, options.new, options.output)
    if not options.quiet:
        sizes = [file.stat().st_size for file in (path, options.new)]
        print(f"{path}: {sizes[0]:,} bytes in the place of {sizes[1]:,}")
    return 0
