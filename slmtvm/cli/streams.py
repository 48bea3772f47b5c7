"""Standard output where there is none, where nobody reads it, or where it is full."""

from __future__ import annotations

import errno
import os
import sys

_STANDARD = (0, 1, 2)
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def replace_closed_streams() -> None:
    """Put /dev/null where a standard stream is closed.

    A file that is opened later would get its number, and what is printed would go there.
    """
    for number in _STANDARD:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def is_of_output(error: OSError) -> bool:
    """Whether ``error`` is of a write to standard output.

    Verbs name the files that they cannot write; what has no name and is such an error is this one.
    """
    return error.filename is None and error.errno in _WRITE_ERRORS


def drop_output() -> None:
    """Let what is still to be written go nowhere; Python would complain once more at its exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
