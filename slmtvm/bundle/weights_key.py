"""The key that a bundle's weights are encrypted with, and where it comes from."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from pathlib import Path

from slmtvm.errors import SlmError

VARIABLE = "SLM_WEIGHTS_KEY"
MAY_SWAP = "SLM_WEIGHTS_MAY_SWAP"
KEY_BYTES = 32
_COMMAND_SECONDS = 120
_MOST_BYTES = 1 << 12
_KEYCTL_READ = 11
# The numbers of the system calls request_key and keyctl.
_KEY_CALLS = {"x86_64": (249, 250), "aarch64": (218, 219), "riscv64": (218, 219)}


def read_weights_key(source: str) -> bytes:
    """The 32 bytes that ``source`` gives, as they are or as 64 hexadecimal digits.

    source: ``file:PATH``, ``fd:NUMBER`` of an open file, ``keyring:NAME`` of a key of the type
    "user" in the kernel's keyrings of this process, or ``command:COMMAND``, whose standard output
    has the key: it may ask a TPM. Raises SlmError, which never has the key in it.
    """
    kind, _, rest = source.partition(":")
    try:
        if kind == "file":
            with Path(rest).open("rb") as file:
                content = file.read(_MOST_BYTES)
        elif kind == "fd" and rest.isdecimal():
            with open(int(rest), "rb", closefd=False) as file:
                content = file.read(_MOST_BYTES)
        elif kind == "keyring":
            content = _kept(rest)
        elif kind == "command":
            content = _ask(rest)
        else:
            raise SlmError(
                f"{source!r} must be file:PATH, fd:NUMBER, keyring:NAME or command:COMMAND",
                where=VARIABLE,
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


def _kept(name: str) -> bytes:
    """What the kernel's keyrings have under ``name``; raises OSError where that is nothing."""
    calls = _KEY_CALLS.get(os.uname().machine)
    if calls is None:
        raise OSError(errno.ENOSYS, f"keyrings are not known on {os.uname().machine}")
    request, control = calls
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    key = syscall(ctypes.c_long(request), b"user", os.fsencode(name), None, ctypes.c_long(0))
    room = ctypes.create_string_buffer(_MOST_BYTES)
    count = -1
    if key >= 0:
        count = syscall(
            ctypes.c_long(control), ctypes.c_long(_KEYCTL_READ), ctypes.c_long(key), room,
            ctypes.c_long(len(room)),
        )  # fmt: skip
    if count < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return room.raw[:count]


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
