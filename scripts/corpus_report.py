#!/usr/bin/env python3
"""Takes every file of a corpus through import, compile and run, and compares with onnxruntime.

    python scripts/corpus_report.py FOLDER [--last import] [--only 'llama-*'] [--jobs 2] [--docs]

Each file is checked in a process of its own with a time limit, so that a crash ends that file only.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from corpus.check import STAGES, Outcome, check
from corpus.kept_kernels import keep_kernels
from corpus.page import write_page
from corpus.selection import is_model, left_out

_PAGE = Path(__file__).resolve().parents[1] / "docs" / "import.md"
_SECONDS = 300  # for each file


class Check:
    """``check`` in a forked process: tvm is loaded once, and a crash ends the child alone."""

    def __init__(self, path: Path, bundles: Path, last: str) -> None:
        context = multiprocessing.get_context("fork")
        self._path, self._last = path, last
        self._deadline = time.monotonic() + _SECONDS
        self.result, there = context.Pipe(duplex=False)
        self._process = context.Process(target=_send, args=(path, bundles, last, there))
        self._process.start()
        there.close()

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self._deadline

    def outcome(self) -> Outcome:
        """What it sent; ends it where it has sent nothing."""
        try:
            if not self.result.poll():
                self._process.terminate()
                return Outcome(str(self._path), self._last, error=f"takes over {_SECONDS} s")
            return self.result.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            name = signal.Signals(-code).name if code else "no result"
            return Outcome(str(self._path), self._last, error=f"crashes: {name}")
        finally:
            self._process.join()


def _send(path: Path, bundles: Path, last: str, there: Connection) -> None:
    there.send(check(path, bundles, last))


def check_all(paths: Sequence[Path], last: str, jobs: int) -> Iterator[Outcome]:
    """Outcomes as they come, ``jobs`` files at a time."""
    waiting: list[Path] = list(reversed(paths))
    running: list[Check] = []
    with tempfile.TemporaryDirectory() as bundles:
        keep_kernels(Path(bundles) / "kernels")
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(Check(waiting.pop(), Path(bundles), last))
            wait([c.result for c in running], timeout=1)
            for done in [c for c in running if c.result.poll() or c.is_late]:
                running.remove(done)
                yield done.outcome()


def corpus_files(folder: Path, only: Sequence[str]) -> list[Path]:
    """Every ONNX file of the cells whose names match one of the patterns."""
    files = sorted(folder.glob("[!.]*/*.onnx"))
    return [f for f in files if _matches(f.parent.name, only) and is_model(f.name)]


def _matches(cell: str, only: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(cell, pattern) for pattern in only)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--last", choices=STAGES, default=STAGES[-1], help="stop after this stage")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of the cells' names")
    parser.add_argument("--jobs", type=int, default=1, help="files at a time, each on one core")
    parser.add_argument(
        "--json", type=Path, help="add each outcome to this file, a line for each; the last counts"
    )
    parser.add_argument(
        "--resume", action="store_true", help="leave out what went so far in --json"
    )
    parser.add_argument(
        "--docs",
        action="store_true",
        help="write the tables of docs/import.md: of task heads where the folder has any, of all "
        "others where it has any",
    )
    arguments = parser.parse_args(argv)
    rows = read_outcomes(arguments.json) if arguments.resume else {}
    paths = corpus_files(arguments.folder, arguments.only)
    due = [p for p in paths if not _is_done(rows.get(str(p)), arguments.last)]
    begin = time.monotonic()
    for outcome in check_all(due, arguments.last, arguments.jobs):
        rows[outcome.file] = outcome.to_dict()
        verdict = "ok" if outcome.held else "turned"
        numbers = outcome.compiled or outcome.evaluated
        state = outcome.error or f"{verdict} {outcome.rule} {numbers}"
        print(f"{Path(outcome.file).relative_to(arguments.folder)}: {state}"[:300], flush=True)
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps(outcome.to_dict()) + "\n")
    found = [rows[str(path)] for path in paths]
    good = sum(not row["error"] and row["held"] for row in found)
    print(f"{good} of {len(found)} files pass; {time.monotonic() - begin:.0f} s for {len(due)}")
    if arguments.docs:
        missing = left_out(arguments.folder).items()
        missing = {cell: why for cell, why in missing if _matches(cell, arguments.only)}
        write_page(_PAGE, found, missing)


def _is_done(row: dict[str, Any] | None, last: str) -> bool:
    """Whether the file passed, up to this stage at least."""
    return bool(row and not row["error"] and STAGES.index(row["last"]) >= STAGES.index(last))


def read_outcomes(path: Path) -> dict[str, dict[str, Any]]:
    """The last outcome of each file, by its name."""
    if not path.exists():
        return {}
    return {row["file"]: row for row in map(json.loads, path.read_text().splitlines())}


if __name__ == "__main__":
    main()
