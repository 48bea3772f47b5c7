#!/usr/bin/env python3
"""Takes every file of a corpus through import, compile and run, and compares with onnxruntime.

    python scripts/corpus_report.py FOLDER [--last import] [--only 'llama-*'] [--json out] [--docs]

Each file is checked in a process of its own with a time limit, so that a crash ends that file only.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from corpus.check import STAGES, Outcome, check
from corpus.page import write_page
from corpus.selection import is_model

_PAGE = Path(__file__).resolve().parents[1] / "docs" / "import.md"
_SECONDS = 120  # for each file


def _checked(path: Path, last: str, queue: multiprocessing.Queue[Outcome]) -> None:
    queue.put(check(path, last))


def check_apart(path: Path, last: str) -> Outcome:
    """``check`` in a forked process: tvm is loaded once, and a crash ends the child alone."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_checked, args=(path, last, queue))
    process.start()
    process.join(_SECONDS)
    if process.is_alive():
        process.terminate()
        process.join()
        return Outcome(str(path), error=f"takes over {_SECONDS} s")
    if queue.empty():
        name = signal.Signals(-process.exitcode).name if process.exitcode else "no result"
        return Outcome(str(path), error=f"crashes: {name}")
    return queue.get()


def corpus_files(folder: Path, only: str) -> list[Path]:
    """Every ONNX file of the cells whose names match."""
    files = sorted(folder.glob("*/*.onnx"))
    return [f for f in files if fnmatch.fnmatch(f.parent.name, only) and is_model(f.name)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--last", choices=STAGES, default=STAGES[-1], help="stop after this stage")
    parser.add_argument("--only", default="*", help="pattern of the cells' names")
    parser.add_argument("--json", type=Path, help="write all outcomes to this file")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/import.md")
    arguments = parser.parse_args(argv)
    outcomes = []
    for path in corpus_files(arguments.folder, arguments.only):
        outcome = check_apart(path, arguments.last)
        outcomes.append(outcome)
        name = path.relative_to(arguments.folder)
        state = outcome.error or f"ok {outcome.rule} {outcome.compiled or outcome.evaluated}"
        print(f"{name}: {state}"[:300], flush=True)
    good = sum(not o.error for o in outcomes)
    print(f"{good} of {len(outcomes)} files pass")
    rows = [outcome.to_dict() for outcome in outcomes]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.docs:
        write_page(_PAGE, rows)


if __name__ == "__main__":
    main()
