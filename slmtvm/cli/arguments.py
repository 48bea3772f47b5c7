"""Types of command-line values that several verbs share."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def threads(text: str) -> int:
    """A number of threads, 0 for one for each core that this process may use."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of threads; 0 stands for one for each core"
        )
    return value


def add_threads(parser: argparse.ArgumentParser) -> None:
    """``--threads``, 1 by default: small models are faster without hand-overs between cores."""
    parser.add_argument(
        "--threads", type=threads, default=1,
        help="most threads (default 1); 0: one for each core that this process may use, by its "
        "affinity and its control group's quota, of cores that differ in speed the fast ones",
    )  # fmt: skip
    add_cores(parser)


def add_cores(parser: argparse.ArgumentParser) -> None:
    """``--cores``."""
    parser.add_argument(
        "--cores", metavar="LIST", help="cores to compute on, such as 4-7,9 (default: any)"
    )
