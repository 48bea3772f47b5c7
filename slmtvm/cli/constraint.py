"""Compile what a model may write, a schema, choices, a regex or calls, for a device's programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from slmtvm.cli.arguments import add_constraint, json_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle, x.slm, for whose tokenizer it is")
    group = add_constraint(parser, required=True)
    group.add_argument(
        "--tools", type=json_file, metavar="FILE",
        help="call one of these tools, an array as OpenAI's clients send it, as the model's chat "
        "template writes calls",
    )  # fmt: skip
    parser.add_argument("--tool", metavar="NAME", help="of --tools, call this one")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write"
    )


def run(options: argparse.Namespace) -> int:
    from slmtvm.constrain import constrain
    from slmtvm.errors import ConstraintError

    if options.tool is not None and options.tools is None:
        raise ConstraintError("--tool chooses among --tools: give these, too")
    if options.tools is not None and not isinstance(options.tools, list):
        raise ConstraintError("--tools must be an array of tools")
    made = constrain(
        options.bundle,
        json_schema=options.json_schema,
        choices=options.choices,
        regex=options.regex,
        tools=options.tools,
        tool=options.tool,
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
