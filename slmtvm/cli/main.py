"""Chooses the verb; turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from slmtvm.cli import bench, compile, inspect, quantize, run, targets, verify
from slmtvm.errors import SlmError

FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_VERBS = (compile, run, inspect, verify, quantize, bench, targets)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slmtvm", description="Compile small language models from ONNX, and run them."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in _VERBS:
        name = verb.__name__.rpartition(".")[2]
        summary = (verb.__doc__ or "").splitlines()[0]
        options = verbs.add_parser(name, help=summary, description=summary)
        # Also after the verb; there it has no default, which would undo one given before.
        options.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        verb.add_arguments(options)
        options.set_defaults(verb=verb.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``slmtvm`` with ``arguments`` (the process's own by default); returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.verb(options)
        sys.stdout.flush()
        return code
    except SlmError as error:
        if options.debug:
            raise
        print(f"slmtvm: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (slmtvm ... | head); Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
