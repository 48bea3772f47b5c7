"""The key that a bundle's weights are encrypted with, and where it comes from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from slmtvm.errors import SlmError

VARIABLE = "SLM_WEIGHTS_KEY"
MAY_SWAP = "SLM_WEIGHTS_MAY_SWAP"
KEY_BYTES = 32
_COMMAND_SECONDS = 120
_MOST_BYTES = 1 << 12


def read_weights_key(source: str) -> bytes:
    """The 32 bytes that ``source`` gives, as they are or as 64 hexadecimal digits.

    source: ``file:PATH``, ``fd:NUMBER`` of an open file, or ``command:COMMAND``, whose standard
    output has the key: it may ask a TPM or the kernel's keyring. Raises SlmError, which never has
    the key in it.
    """
    kind, _, rest = source.partition(":")
    try:
        if kind == "file":
            with Path(rest).open("rb") as file:
                content = file.read(_MOST_BYTES)
        elif kind == "fd" and rest.isdecimal():
            with open(int(rest), "rb", closefd=False) as file:
                content = file.read(_MOST_BYTES)
        elif kind == "command":
            content = _ask(rest)
        else:
            raise SlmError(
                f"{source!r} must be file:PATH, fd:NUMBER or command:COMMAND", where=VARIABLE
            )
    except OSError as error:
        raise SlmError(f"{source}: cannot be read: {error.strerror}", where=VARIABLE) from error
    return _parse(content, source)


def weights_key_of_environment() -> bytes | None:
    """The key that the variable SLM_WEIGHTS_KEY leads to; None where it is not set."""
    source = os.environ.get(VARIABLE)
    return read_weights_key(source) if source else None


def may_swap() -> bool:
    """Whether SLM_WEIGHTS_MAY_SWAP lets decrypted weights go to swap space."""
    return os.environ.get(MAY_SWAP) == "1"


def _ask(command: str) -> bytes:
    try:
        done = subprocess.run(
            command, shell=True, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=_COMMAND_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise SlmError(f"no key after {_COMMAND_SECONDS} seconds", where=command) from error
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise SlmError(
            f"exit code {done.returncode}" + (f": {words[-1]}" if words else ""), where=command
        )
    return done.stdout


def _parse(content: bytes, source: str) -> bytes:
    if len(content) == KEY_BYTES:
        return content
    try:
        key = bytes.fromhex(content.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise SlmError(
            f"{source}: {len(content)} bytes are no key: it has {KEY_BYTES} bytes, or "
            f"{2 * KEY_BYTES} hexadecimal digits",
            where=VARIABLE,
        )
    return key
