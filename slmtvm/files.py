"""Reading files of any origin: regular ones only, up to a bound; what to say where there is none.

A named pipe would be waited for for ever, and a link may lead to a device without an end.
"""

from __future__ import annotations

import difflib
import os
import stat
from itertools import islice
from pathlib import Path

from slmtvm.errors import SlmError

_LISTED = 1000  # names of a folder that a misspelt one is compared with


def read_file(path: str | Path, limit: int, error: type[SlmError] = SlmError) -> bytes:
    """The content of the regular file ``path``, of ``limit`` bytes at most.

    Raises ``error``, naming ``path``, where there is none, it is something else or is larger.
    """
    try:
        # Without O_NONBLOCK, to open a pipe that nobody writes to would wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise error(f"is {_kind(status.st_mode)}, not a file", where=str(path))
            content = file.read(limit + 1)
    except FileNotFoundError as missing:
        raise error(no_such_file(path), where=str(path)) from missing
    except (OSError, ValueError) as failure:  # ValueError: a NUL in the name
        reason = failure.strerror if isinstance(failure, OSError) else failure
        raise error(f"cannot be read: {reason}", where=str(path)) from failure
    if len(content) > limit:
        raise error(
            f"is too large: more than {limit:,} bytes, the most that is read", where=str(path)
        )
    return content


def read_text(path: str | Path, limit: int, error: type[SlmError] = SlmError) -> str:
    """Like ``read_file``, as UTF-8; no newline is translated."""
    content = read_file(path, limit, error)
    try:
        return content.decode()
    except UnicodeDecodeError as failure:
        raise error(f"is not UTF-8 text: {failure}", where=str(path)) from failure


def no_such_file(path: str | Path) -> str:
    """'no such file', and what in the same folder has nearly that name."""
    path = Path(path)
    try:
        names = [item.name for item in islice(path.parent.iterdir(), _LISTED)]
    except FileNotFoundError:
        return f"no such file: there is no folder {path.parent}"
    except (OSError, ValueError):
        return "no such file"
    others = [name for name in names if name != path.name]  # what is there is no file
    return f"no such file{did_you_mean(path.name, others, str(path.parent))}"


def did_you_mean(name: str, names: list[str], folder: str = "") -> str:
    """'; did you mean ...?' with the nearest of ``names``, or nothing where none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {Path(folder, near[0])}?" if near else ""


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((name for test, name in kinds if test(mode)), "something else")
