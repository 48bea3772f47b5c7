"""Check that no line of a log of slm-serve --audit was changed, moved or left out."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        title="actions", metavar="ACTION", dest="action", required=True
    )  # fmt: skip
    verify = actions.add_parser("verify", help="check each line's hash of the line before it")
    verify.add_argument("log", type=Path, help="the file that --audit named")
    verify.add_argument(
        "--holds", action="append", default=[], metavar="HASH",
        help="the hash of a line that must be there, as an earlier check printed it: lines that "
        "were cut off at the end are found by this alone; may be given several times",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from slmtvm.audit import verify_log

    checked = verify_log(options.log, holds=options.holds)
    if not options.quiet:
        print(f"{options.log}: {checked.lines} lines, each with the hash of the line before it")
    print(checked.last)
    return 0
