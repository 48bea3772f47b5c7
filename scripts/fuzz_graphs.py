#!/usr/bin/env python3
"""Alters small valid graphs at random and compares each with onnxruntime.

    python scripts/fuzz_graphs.py --count 3000 --seed 1 [--keep FOLDER] [--compile]

A graph must come out right or be refused by an error that says why; one that does not is printed
with what was altered, and its file is kept in FOLDER. --compile makes a bundle of each and runs
that, where otherwise its ops are computed with numpy. Needs the test extra.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

REPORT_EVERY = 100


def main() -> int:
    from tests.importer.altered_graphs import BASES, Tally, altered_graphs

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="graphs")
    parser.add_argument("--seed", type=int, default=0, help="makes the choice repeatable")
    parser.add_argument("--keep", type=Path, help="folder for the files that do not come out right")
    parser.add_argument("--compile", action="store_true", help="compile each graph and run it")
    parser.add_argument("--bases", nargs="+", default=BASES, choices=BASES, metavar="GRAPH")
    args = parser.parse_args()
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        verdicts = altered_graphs(
            tuple(args.bases), args.count, args.seed, Path(folder), keep=args.keep,
            compiled=args.compile,
        )  # fmt: skip
        for index, verdict in enumerate(verdicts):
            tally.add(verdict)
            if not verdict.good:
                print(f"{args.seed}-{index} {verdict}", flush=True)
            if index % REPORT_EVERY == REPORT_EVERY - 1:
                print(f"{index + 1} graphs: {dict(tally.endings)}", flush=True)
    print(f"{args.count} graphs: {dict(tally.endings)}")
    return 1 if tally.bad else 0


if __name__ == "__main__":
    sys.exit(main())
