"""Serve a bundle over HTTP, as OpenAI's clients ask: completions, chat, embeddings."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# Of slm-serve, which checks them: name, what stands for the value, what it is.
_OPTIONS = (
    ("host", "ADDRESS", "where to listen (default 127.0.0.1); others need --key-file"),
    ("port", "N", "0 takes a free one (default 8080)"),
    ("unix", "PATH", "listen on a Unix socket instead"),
    ("key-file", "FILE", "holds the key that requests must bring: Authorization: Bearer KEY"),
    ("keys", "FILE", "public keys (PEM), by one of which the bundle must be signed"),
    ("name", "NAME", "what the model is called (default: the bundle's name)"),
    ("sessions", "N", "texts that are computed side by side, each with a KV cache (default 2)"),
    ("connections", "N", "most connections (default 32)"),
    ("queue", "N", "most requests that wait for a session (default 32)"),
    ("max-body", "BYTES", "of a request (default 1048576)"),
    ("max-tokens", "N", "most tokens that an answer may have (default: the context)"),
    (
        "audit",
        "FILE",
        "log a line for each POST request, with hashes of what was asked and answered",
    ),
    ("timeout", "S", "most seconds for a request, waiting included (default 300)"),
    ("read-timeout", "S", "most seconds for a request to come in (default 30)"),
    ("grace", "S", "seconds that requests have to finish after SIGTERM (default 30)"),
    ("threads", "N", "most threads that compute, 0: as many as there are cores (default 1)"),
    ("cores", "LIST", "cores to compute on, such as 4-7,9 (default: any)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle, x.slm")
    for name, value, text in _OPTIONS:
        parser.add_argument(f"--{name}", metavar=value, help=text, dest=_field(name))
    parser.add_argument(
        "--constraint", action="append", default=[], metavar="NAME=FILE",
        help="what response_format may ask for by this name, as slmtvm constraint compiled it (may "
        "be given several times)",
    )  # fmt: skip
    parser.add_argument(
        "--open", action="store_true", help="listen for other machines without a key"
    )


def _field(name: str) -> str:
    return "serve_" + name.replace("-", "_")  # the command's own parser has a "name", too


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from slmtvm.runtime.serving import server_program

    with tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=options.quiet or None) as bar:
        program = server_program(options.bundle, progress=bar.set_description_str)
    command = [str(program), str(options.bundle)]
    for name, _, _ in _OPTIONS:
        value = getattr(options, _field(name))
        if value is not None:
            command += [f"--{name}", value]
    for constraint in options.constraint:
        command += ["--constraint", constraint]
    if options.open:
        command.append("--open")
    os.execv(program, command)  # signals reach the server itself
