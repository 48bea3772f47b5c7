#!/usr/bin/env python3
"""Bundles of one model against each other: decoding and reading prompts, in turns.

    python scripts/bench_turns.py dense.slm sparse.slm [--threads 1] [--behind 60] [--rounds 24]

What else the machine does meets all of them alike. A line gives the median and the least time, and
how many times as fast as the first bundle in the same round: median, quartiles, and by the least
times. Says as well whether the bundles' logits have the same bits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from slmtvm.runtime import Session, load

TOKENS = 12  # decoded in a round, and left out of the time before them
PROMPT = 128


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def round_of(session: Session, ids: np.ndarray, behind: int) -> tuple[float, float]:
    """Seconds of a token behind so many others, and of a prompt."""
    session.reset()
    session.eval(ids[:behind])
    tokens = [ids[i : i + 1] for i in range(TOKENS)]
    decode = seconds(lambda: [session.eval(token) for token in tokens]) / TOKENS
    session.reset()
    return decode, seconds(lambda: session.eval(ids[:PROMPT]))


def report(what: str, name: str, times: list[float], first: list[float]) -> None:
    ratios = np.quantile(np.divide(first, times), [0.25, 0.5, 0.75])
    print(
        f"{what:8} {name:24} {np.median(times) * 1e3:8.2f} ms (least {min(times) * 1e3:.2f})  "
        f"x{ratios[1]:.2f} [{ratios[0]:.2f}..{ratios[2]:.2f}], least x{min(first) / min(times):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--behind", type=int, default=60, help="tokens before those decoded")
    parser.add_argument("--rounds", type=int, default=24)
    options = parser.parse_args()
    sessions = [load(path, threads=options.threads) for path in options.bundles]
    vocabulary = len(sessions[0].eval([0]))
    count = max(options.behind, PROMPT, TOKENS)
    ids = np.random.default_rng(0).integers(0, vocabulary, count).astype(np.int32)
    found: list[np.ndarray] = []
    for session in sessions:
        session.reset()
        found.append(np.asarray(session.eval(ids[:PROMPT])))
    same = all(np.array_equal(f.view(np.uint32), found[0].view(np.uint32)) for f in found)
    print("logits:", "the same bits" if same else "NOT the same bits")
    times: list[list[tuple[float, float]]] = [[] for _ in sessions]
    for _ in range(options.rounds):
        for session, taken in zip(sessions, times, strict=True):
            taken.append(round_of(session, ids, options.behind))
    for i, what in enumerate(("decode", f"{PROMPT} rows")):
        for path, taken in zip(options.bundles, times, strict=True):
            report(what, path.name, [t[i] for t in taken], [t[i] for t in times[0]])


if __name__ == "__main__":
    main()
