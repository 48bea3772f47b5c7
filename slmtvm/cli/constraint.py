"""Compile what a model may write: a JSON schema, choices or a regex, for slm-run and slm-serve."""

from __future__ import annotations

import argparse
from pathlib import Path

from slmtvm.cli.arguments import add_constraint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle, x.slm, for whose tokenizer it is")
    add_constraint(parser, required=True)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write"
    )


def run(options: argparse.Namespace) -> int:
    from slmtvm.constrain import constrain

    made = constrain(
        options.bundle,
        json_schema=options.json_schema,
        choices=options.choices,
        regex=options.regex,
        output=options.output,
    )
    if not options.quiet:
        print(
            f"{options.output}: {len(made.content) / 1000:.0f} kB, {made.states} states, "
            f"{made.classes} classes of tokens; at least {made.least_tokens} tokens a text"
        )
        if not made.ends:
            print("no token of the model ends a text: one that may go on goes on to its limit")
    return 0
