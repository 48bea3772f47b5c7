#!/usr/bin/env python3
"""Compares the compiled tokenizer's speed with the `tokenizers` package's, on one core.

    python scripts/bench_tokenizer.py BUNDLE TEXT [--rounds N]

TEXT is a file in UTF-8. Both take turns; printed are the best rates over the rounds, for the whole
text at once and for lines of it one by one, in megabytes of text a second.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

os.environ["TOKENIZERS_PARALLELISM"] = "false"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    text = options.text.read_bytes()
    for name, pieces in (("whole", [text]), ("lines", text.splitlines(keepends=True))):
        ours, theirs = _rates(options.bundle, pieces, options.rounds)
        print(f"{name}: {ours:.1f} MB/s, tokenizers {theirs:.1f} MB/s, {ours / theirs:.1f} times")


def _rates(bundle: Path, pieces: list[bytes], rounds: int) -> tuple[float, float]:
    import slmtvm

    with slmtvm.load(bundle) as session, session.model.compiled_tokenizer() as compiled:
        call, handle = session.model.library.call, compiled._handle
        most = max(map(len, pieces))
        work = np.empty(call("slm_tokenize_bytes", handle, most) // 8 + 1, np.uint64)
        ids = np.empty(4 * most + 16, np.int32)
        given = (ids.ctypes.data, ctypes.c_void_p(), len(ids), work.ctypes.data, work.nbytes)
        strings = [piece.decode() for piece in pieces]
        tokenizer = session.tokenizer

        def ours() -> None:
            for piece in pieces:
                call("slm_tokenize", handle, piece, len(piece), 0, *given)

        def theirs() -> None:
            for string in strings:
                tokenizer.encode(string)

        total = sum(map(len, pieces))
        times = [(_seconds(ours), _seconds(theirs)) for _ in range(rounds)]
        best = [total / min(column) / 1e6 for column in zip(*times, strict=True)]
        return best[0], best[1]


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
