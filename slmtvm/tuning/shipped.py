"""Records that come with the package: what a compile takes where it is given none.

One file for each target that there are any of, ``shipped/TARGET.jsonl``, as ``slmtvm tune`` writes
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from slmtvm.target import Target
from slmtvm.tuning.records import Line, RecordLog, read_lines

FOLDER = resources.files("slmtvm") / "tuning" / "shipped"


def shipped_records(targets: Iterable[Target]) -> RecordLog:
    """Those of ``targets``; RecordError where a file is damaged."""
    found: list[Line] = []
    for name in sorted({target.name for target in targets}):
        file = FOLDER / f"{name}.jsonl"
        if file.is_file():
            with resources.as_file(file) as path:
                found += read_lines(Path(path))
    return RecordLog.of(found)
