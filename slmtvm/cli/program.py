"""Link programs for devices: static, with the model's code inside, so that they need nothing."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle, x.slm")
    parser.add_argument(
        "--target", action="append", metavar="NAME",
        help="one of the bundle's targets (may be given several times; default: all of them)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR",
        help="the folder to write the programs to (default: the current one)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from slmtvm.codegen.program import build_programs

    with tqdm(bar_format="{desc} [{elapsed}]", disable=options.quiet or None) as bar:
        made = build_programs(
            options.bundle, options.target, options.output, progress=bar.set_description_str
        )
    if not options.quiet:
        for path in made:
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    return 0
