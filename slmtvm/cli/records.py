"""Show or merge records of tuning."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    show = actions.add_parser("show", help="the best setting of each kernel")
    show.add_argument("records", type=Path, nargs="+", help="files of records")
    show.add_argument("--all", action="store_true", help="every setting, not only the best")
    show.add_argument(
        "--plot", type=Path, metavar="FILE",
        help="write plots here too (.png, .svg, .pdf): the best over trials, knobs against time",
    )  # fmt: skip
    merge = actions.add_parser("merge", help="every record of several files once")
    merge.add_argument("records", type=Path, nargs="+", help="files of records")
    merge.add_argument("-o", "--output", type=Path, required=True, help="the file to write")


def run(options: argparse.Namespace) -> int:
    if options.action == "merge":
        from slmtvm.tuning.records import merge_records

        count = merge_records(options.records, options.output)
        if not options.quiet:
            print(f"{options.output}: {count} records")
        return 0
    from slmtvm.tuning.records import read_log
    from slmtvm.tuning.show import table

    logs = [read_log(path) for path in options.records]
    records = [r for log in logs for r in log.kernels]
    print(table(records, every=options.all))
    for log in logs:
        for confirmation in log.confirmations:
            print(f"{confirmation.provenance.target}, {confirmation.model}: {confirmation}")
        for setup in log.setups:
            print(f"{setup.provenance.target}, {setup.model}: {setup}")
    if options.plot:
        from slmtvm.tuning.plot import plot

        left_out = plot(records, options.plot)
        if left_out and not options.quiet:
            print(f"{options.plot}: the {left_out} kernels with the fewest records are left out")
    return 0
