"""Measure on this machine, for tuners: the file that also runs alone on a board."""

from __future__ import annotations

import argparse
from pathlib import Path

from slmtvm.errors import RpcError
from slmtvm.rpc import slm_runner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    slm_runner.add_arguments(parser)
    actions = parser.add_subparsers(title="instead", metavar="pack", dest="action")
    pack = actions.add_parser("pack", help="write what a board needs, instead of running here")
    pack.add_argument("--target", required=True, help="what the board is")
    pack.add_argument(
        "-o", "--output", type=Path, default=Path("runner.tar.gz"), metavar="FILE",
        help="the archive (default: runner.tar.gz)",
    )  # fmt: skip
    pack.add_argument("--tls", type=Path, metavar="DIR", dest="keys", help="keys to put into it")


def run(options: argparse.Namespace) -> int:
    if options.action == "pack":
        from slmtvm.rpc.pack import pack_runner
        from slmtvm.target import Target

        print(pack_runner(Target.load(options.target), options.output, keys=options.keys))
        return 0
    try:
        return slm_runner.serve(options)
    except slm_runner.SetupError as error:
        raise RpcError(str(error)) from error
