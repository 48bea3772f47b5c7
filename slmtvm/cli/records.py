"""Show or merge records of tuning."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    show = actions.add_parser("show", help="the best setting of each kernel")
    show.add_argument("records", type=Path, nargs="+", help="files of records")
    show.add_argument("--all", action="store_true", help="every setting, not only the best")
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
    from slmtvm.tuning.records import read_records
    from slmtvm.tuning.show import table

    print(table([r for path in options.records for r in read_records(path)], every=options.all))
    return 0
