"""Types of command-line values that several verbs share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from slmtvm.errors import SlmError

if TYPE_CHECKING:
    from slmtvm.bundle.signature import Signer
    from slmtvm.rpc.device_bundle import Place

_MOST_SCHEMA_BYTES = 1 << 20


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


class CacheTypes(tuple[str, ...]):
    """Choices of ``--kv``: these, and what begins with "rank:"."""

    def __contains__(self, value: object) -> bool:
        return super().__contains__(value) or str(value).startswith("rank:")


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


def add_constraint(
    parser: argparse.ArgumentParser, *, required: bool
) -> argparse._MutuallyExclusiveGroup:
    """``--json-schema``, ``--choices`` and ``--regex``, of which one at most may be given."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument(
        "--json-schema", type=json_file, metavar="FILE",
        help="write JSON that is valid by this schema (2020-12; what is not compiled is refused)",
    )  # fmt: skip
    group.add_argument(
        "--choices", type=lambda text: text.split(","), metavar="A,B,...",
        help="write one of these texts",
    )  # fmt: skip
    group.add_argument("--regex", help="write a text that this regex matches from end to end")
    return group


def json_file(name: str) -> object:
    """What a JSON file holds."""
    from slmtvm.files import read_text

    try:
        return json.loads(read_text(name, _MOST_SCHEMA_BYTES))
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{name} is no JSON: {error}") from error
    except SlmError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def natural(text: str) -> int:
    """A whole number of at least 0, as files and C have it."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return value


def add_signer(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """``--key`` and ``--sign-with``, of which one at most may be given."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument(
        "--key", type=Path, metavar="FILE",
        help="the private key, as slmtvm keygen writes it; the password of an encrypted one is "
        "taken from the variable SLMTVM_KEY_PASSWORD",
    )  # fmt: skip
    group.add_argument(
        "--sign-with", metavar="COMMAND",
        help="a shell command that writes the Ed25519 signature, 64 bytes, of the file {} to its "
        "standard output: for keys in hardware",
    )  # fmt: skip


def signer(options: argparse.Namespace) -> Signer | None:
    """What ``add_signer``'s options say, if anything."""
    from slmtvm.bundle.signature import command_signer, key_signer

    if options.key:
        return key_signer(options.key)
    return command_signer(options.sign_with) if options.sign_with else None


def add_place(parser: argparse.ArgumentParser) -> None:
    """``--rpc`` and what goes with it: on a device instead of this machine."""
    parser.add_argument(
        "--rpc", metavar="HOST:PORT", help="run the bundle on a device of this tracker"
    )
    parser.add_argument(
        "--key", metavar="K",
        help="which of the tracker's devices (default: the bundle's target, where it has one)",
    )  # fmt: skip
    parser.add_argument("--tls", type=Path, metavar="DIR", help="the tuner's keys")


def place(options: argparse.Namespace) -> Place | None:
    """What ``add_place``'s options say, for ``options.bundle``; SlmError where they do not fit."""
    from slmtvm.bundle.read import Bundle
    from slmtvm.errors import SlmError
    from slmtvm.rpc.device_bundle import Place

    if options.rpc is None:
        for name in ("key", "tls"):
            if getattr(options, name) is not None:
                raise SlmError("is for devices of a tracker: give --rpc too", where=f"--{name}")
        return None
    key = options.key or options.target
    if key is None:
        targets = Bundle.open(options.bundle).targets
        if len(targets) > 1:
            raise SlmError(
                f"say which device with --key: {options.bundle} is for {', '.join(targets)}",
                where="--rpc",
            )
        key = targets[0]
    return Place(options.rpc, key, options.tls)
