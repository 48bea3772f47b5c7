"""Measure a bundle on this machine or a device, beside what the machine would allow."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from slmtvm.cli.arguments import add_cores, add_place, place, threads
from slmtvm.cli.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle, x.slm")
    parser.add_argument(
        "--threads", type=threads, nargs="+", metavar="N",
        help="numbers of threads to measure (default: 1 to all cores); 0: one for each core that "
        "this process may use",
    )  # fmt: skip
    add_cores(parser)
    parser.add_argument("--target", help="which of the bundle's libraries (default: the best here)")
    add_place(parser)
    parser.add_argument(
        "--brief", action="store_true", help="leave out where the time goes, kernel by kernel"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from slmtvm.bench import bench, html_page

    with tqdm(bar_format="{desc}", leave=False, disable=options.quiet or None) as bar:
        report = bench(
            options.bundle,
            threads=options.threads,
            cores=options.cores,
            target=options.target,
            kernels=not options.brief,
            place=place(options),
            progress=bar.set_description_str,
        )
    print(report)
    if options.json:
        write_text(options.json, json.dumps(report.to_json(), indent=2) + "\n")
    if options.html:
        write_text(options.html, html_page(report))
    return 0
