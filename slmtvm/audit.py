"""The log of ``slm-serve --audit``: each line holds the hash of the line before it.

Who can write the file can write all of it anew, or cut its end off: an auditor keeps the last hash
of a check elsewhere, and asks the next one for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slmtvm.errors import AuditError

NOTHING_BEFORE = "0" * 64
_MOST_BYTES = 1 << 12  # of a line


@dataclass(frozen=True)
class CheckedLog:
    """How many lines there are, and the SHA-256 of the last one, in hexadecimal."""

    lines: int
    last: str


def verify_log(path: Path, *, holds: Sequence[str] = ()) -> CheckedLog:
    """Check the log at ``path``, line by line, in constant memory.

    holds: hashes of lines that must be there. Raises AuditError, which names the line, where one
    was changed, moved or left out, or is not there; OSError where the file cannot be read.
    """
    missing = {text.lower() for text in holds}
    before, number = NOTHING_BEFORE, 0
    with path.open("rb") as file:
        while line := file.readline(_MOST_BYTES):
            number += 1
            _check_line(line, number, before, f"{path}, line {number}")
            before = hashlib.sha256(line[:-1]).hexdigest()
            missing.discard(before)
    if missing:
        raise AuditError(
            f"no line has the hash {min(missing)}: lines were cut off, or the log was written anew",
            where=str(path),
        )
    return CheckedLog(number, before)


def _check_line(line: bytes, number: int, before: str, where: str) -> None:
    if not line.endswith(b"\n"):
        raise AuditError("has no end: it was cut off while it was written, or later", where=where)
    try:
        entry = json.loads(line)
        given, hashed = entry["line"], entry["before"]
    except (ValueError, TypeError, KeyError):
        raise AuditError("is no line of slm-serve --audit", where=where) from None
    if hashed != before:
        raise AuditError(
            "the line before it was changed, or lines between them are missing", where=where
        )
    if given != number:
        raise AuditError(f"calls itself line {given}: lines before it are missing", where=where)
