"""Compile several models for several targets in parallel."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from slmtvm.cli.arguments import positive
from slmtvm.cli.files import write_text

if TYPE_CHECKING:
    from slmtvm.matrix.result import CellResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("matrix", type=Path, help="the file of models and targets, matrix.toml")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR",
        help="the folder for the bundles (default: the file's own)",
    )  # fmt: skip
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--jobs", type=positive, metavar="N",
        help="how many to compile at a time (default: one for each core)",
    )  # fmt: skip
    where.add_argument(
        "--cluster", metavar="ray://HOST:PORT", help="compile on a Ray cluster instead"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary here too")


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from slmtvm.matrix.compile import compile_matrix

    with tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=options.quiet or None) as bar:

        def tell(cell: CellResult, done: int, of: int) -> None:
            bar.set_description_str(f"{done} of {of}: {cell.model} for {cell.target}")

        report = compile_matrix(
            options.matrix,
            output=options.output,
            jobs=options.jobs,
            cluster=options.cluster,
            progress=tell,
        )
    if not options.quiet:
        print(report)
    if options.json:
        write_text(options.json, json.dumps(report.to_json(), indent=2) + "\n")
    return 1 if report.failed else 0
