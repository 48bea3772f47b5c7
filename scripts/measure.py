#!/usr/bin/env python3
"""Sizes and speed of a decoder's bundle on this machine: what scripts/demo prints at its end.

    python scripts/measure.py BUNDLE [--threads N]

Each time is the best of several repetitions in one process.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import slmtvm

REPETITIONS = 5
PROMPT_TOKENS = 256
NEW_TOKENS = 128


def best_seconds(action: Callable[[], object]) -> float:
    """The shortest of REPETITIONS runs."""
    times = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(path: Path, threads: int) -> list[tuple[str, str]]:
    """Rows of the table: what, and how much with its unit."""
    with slmtvm.load(path, threads=threads) as session:
        manifest, info = session.bundle.manifest, session.info
        target = manifest.targets[info["target"]]
        prompt_tokens = min(PROMPT_TOKENS, info["context"] - NEW_TOKENS)
        # Every token costs the same, whatever it is.
        prompt = np.arange(prompt_tokens, dtype=np.int32) % info["vocab_size"]

        def prefill() -> None:
            session.reset()
            session.eval(prompt)

        def decode() -> None:
            session.seek(prompt_tokens)
            for token in range(NEW_TOKENS):
                session.eval([token])

        prefill_rate = prompt_tokens / best_seconds(prefill)
        decode_rate = NEW_TOKENS / best_seconds(decode)
    load_seconds = best_seconds(lambda: slmtvm.load(path, threads=threads).close())
    memory = sum(v for k, v in target.memory.items() if k != "weights")
    return [
        ("machine", f"{platform.machine()}, target {info['target']}"),
        ("library", f"{target.library.bytes / 1e3:,.0f} kB"),
        ("weights", f"{manifest.weights.bytes / 1e3:,.0f} kB"),
        ("memory of a session", f"{memory / 1e3:,.0f} kB, context {info['context']}"),
        ("load", f"{load_seconds * 1e3:,.1f} ms"),
        ("prefill", f"{prefill_rate:,.0f} tokens/s ({prompt_tokens} tokens)"),
        ("decode", f"{decode_rate:,.0f} tokens/s ({NEW_TOKENS} tokens after them)"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for name, value in measure(options.bundle, options.threads):
        print(f"  {name:20} {value}")


if __name__ == "__main__":
    main()
