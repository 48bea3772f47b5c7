"""Chooses the verb; turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from slmtvm.cli import (
    audit,
    bench,
    compile,
    compile_matrix,
    completion,
    constraint,
    delta,
    encrypt,
    inspect,
    keygen,
    package,
    program,
    prune,
    quantize,
    records,
    rpc,
    run,
    runner,
    serve,
    sign,
    targets,
    tune,
    verify,
    verify_signature,
    watermark,
)
from slmtvm.cli.parser import USAGE, Parser
from slmtvm.cli.signals import Terminated, unwinding
from slmtvm.cli.streams import drop_output, is_of_output, replace_closed_streams
from slmtvm.cli.version import ShowVersion
from slmtvm.errors import SlmError

FAILED = 1
INTERNAL = 70  # EX_SOFTWARE of sysexits.h: a fault of slmtvm itself
SIGNALLED = 128  # and the signal's number, as shells have it
INTERRUPTED = SIGNALLED + 2  # SIGINT

_VERBS = (
    compile,
    compile_matrix,
    run,
    inspect,
    verify,
    quantize,
    prune,
    bench,
    tune,
    records,
    runner,
    rpc,
    program,
    serve,
    constraint,
    audit,
    watermark,
    keygen,
    encrypt,
    sign,
    verify_signature,
    package,
    delta,
    targets,
    completion,
)


def command_parser() -> Parser:
    """The parser of the whole command."""
    parser = Parser(
        prog="slmtvm", description="Compile small language models from ONNX, and run them."
    )
    parser.add_argument("--version", action=ShowVersion, help="show versions, and end")
    _add_common(parser, debug=False, quiet=False)
    parser.set_defaults(parser=parser)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="name", parser_class=Parser)
    for verb in _VERBS:
        name = verb.__name__.rpartition(".")[2].replace("_", "-")
        summary = (verb.__doc__ or "").splitlines()[0]
        options = verbs.add_parser(name, help=summary, description=summary)
        # Also after the verb; there they have no default, which would undo one given before.
        _add_common(options, debug=argparse.SUPPRESS, quiet=argparse.SUPPRESS)
        verb.add_arguments(options)
        options.set_defaults(verb=verb.run)
    return parser


def _add_common(parser: argparse.ArgumentParser, *, debug: object, quiet: object) -> None:
    parser.add_argument(
        "-q", "--quiet", action="store_true", default=quiet,
        help="print errors and what was asked for; no progress, no summaries",
    )  # fmt: skip
    parser.add_argument(
        "--debug", action="store_true", default=debug, help="show the traceback of an error"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``slmtvm`` with ``arguments`` (the process's own by default); returns the exit code."""
    replace_closed_streams()
    parser = command_parser()
    options = parser.parse_args(arguments)
    if options.name is None:
        parser.print_help(sys.stderr)
        return USAGE
    try:
        with unwinding():
            code: int = options.verb(options)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except Terminated as signal:
        return SIGNALLED + signal.number
    except BrokenPipeError:
        drop_output()  # the reader has gone (slmtvm ... | head)
        return FAILED
    except Exception as error:
        message, code = _explain(error)
        if options.debug:
            traceback.print_exc()
        print(f"slmtvm: {message}", file=sys.stderr)
        return code


def _explain(error: Exception) -> tuple[str, int]:
    """The one line that says what went wrong, and the exit code."""
    if isinstance(error, SlmError):
        return f"error: {_one_line(error)}", FAILED
    if isinstance(error, OSError):
        names = [os.fsdecode(n) for n in (error.filename,) if isinstance(n, (str, bytes))]
        if is_of_output(error):
            drop_output()
            names = ["standard output"]
        return f"error: {': '.join([*names, error.strerror or _one_line(error)])}", FAILED
    if isinstance(error, MemoryError):
        return "error: there is not enough memory", FAILED
    if "Too many open files" in str(error):  # modules that cannot be imported say it so
        return "error: this process may not open enough files (ulimit -n)", FAILED
    return (
        f"internal error: {type(error).__name__}: {_one_line(error)}; this is a fault of slmtvm: "
        "please report it with what --debug shows",
        INTERNAL,
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
