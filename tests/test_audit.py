"""A log of slm-serve holds together, or the line is named where it does not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from slmtvm.audit import NOTHING_BEFORE, verify_log
from slmtvm.errors import AuditError
from tests.cli.command import slmtvm

LINES = 5


def log_of(lines: int) -> list[bytes]:
    made: list[bytes] = []
    before = NOTHING_BEFORE
    for number in range(1, lines + 1):
        entry = {"line": number, "request": f"{number:064x}", "before": before}
        made.append(json.dumps(entry).encode() + b"\n")
        before = hashlib.sha256(made[-1][:-1]).hexdigest()
    return made


def test_a_whole_log_is_counted_and_its_last_hash_told(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    lines = log_of(LINES)
    path.write_bytes(b"".join(lines))
    hashes = [hashlib.sha256(line[:-1]).hexdigest() for line in lines]
    checked = verify_log(path, holds=[hashes[1], hashes[-1].upper()])
    assert (checked.lines, checked.last) == (LINES, hashes[-1])
    path.write_bytes(b"")
    assert verify_log(path).lines == 0


@pytest.mark.parametrize(
    ("altered", "said"),
    [
        (lambda lines: [lines[0], lines[1].replace(b"02", b"03"), *lines[2:]], "line 3: .*changed"),
        (lambda lines: [lines[0], *lines[2:]], "line 2: .*missing"),
        (lambda lines: lines[1:], "line 1: .*missing"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1: "),
        (lambda lines: [*lines, b"{}\n"], "line 6: is no line"),
        (lambda lines: [*lines, b"7\n"], "line 6: is no line"),
        (lambda lines: [*lines[:-1], lines[-1][:40]], "line 5: has no end"),
        (lambda lines: lines[:-1], "no line has the hash"),
        (lambda lines: [], "no line has the hash"),
    ],
)
def test_an_altered_log_is_refused_where_it_was_altered(
    altered: object, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "audit.jsonl"
    lines = log_of(LINES)
    last = hashlib.sha256(lines[-1][:-1]).hexdigest()
    assert callable(altered)
    path.write_bytes(b"".join(altered(lines)))
    with pytest.raises(AuditError, match=said):
        verify_log(path, holds=[last])


def test_the_command_prints_what_the_next_check_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"".join(log_of(LINES)))
    last = slmtvm("--quiet", "audit", "verify", path).stdout.strip()
    assert last == verify_log(path).last
    path.write_bytes(b"".join(log_of(LINES)[:-1]))
    result = slmtvm("audit", "verify", path, "--holds", last)
    assert result.returncode == 1
    assert "lines were cut off" in result.stderr
