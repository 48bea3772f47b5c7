#!/usr/bin/env python3
"""Tokens a second of several sessions: evaluated together, and one after the other.

    scripts/bench_batch.py smol135.slm [--sessions 1 2 4 8] [--threads 1] [--rounds 7]
        [--peer smol135.gguf --peer-python PYTHON]

With --peer llama.cpp decodes as many sequences of the same weights with one call, too; PYTHON has
llama-cpp-python installed.
Both take turns within a round, so that what else runs on the machine meets both. A round's ratio is
of its two times; printed are the least times' tokens a second, and the median and the spread of
ratios.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from slmtvm.runtime import Model, Session

TOKENS = 16  # of each session in a round
PROMPT_TOKEN, TOKEN = 3, 5  # every token costs the same


def seconds(sessions: list[Session], position: int, *, together: bool) -> float:
    """The time of TOKENS tokens of each session after ``position``."""
    for session in sessions:
        session.seek(position)
    begin = time.perf_counter()
    for _ in range(TOKENS):
        if together:
            Session.eval_batch(sessions, [TOKEN] * len(sessions))
        else:
            for session in sessions:
                session.eval([TOKEN])
    return time.perf_counter() - begin


class Peer:
    """scripts/peer_batch.py with as many sequences."""

    def __init__(self, options: argparse.Namespace, sequences: int) -> None:
        command = [options.peer_python, str(Path(__file__).parent / "peer_batch.py"), options.peer]
        numbers = (sequences, options.position, options.threads)
        self._process = subprocess.Popen(
            [*command, *map(str, numbers)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        raise SystemExit(f"peer_batch.py ended with {self._process.wait()}")

    def seconds(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{TOKENS}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        self._process.communicate()


def compare(options: argparse.Namespace, sessions: list[Session]) -> None:
    """Ours together against the peer's, in turns."""
    peer, rounds = Peer(options, len(sessions)), []
    for _ in range(options.rounds + 1):
        rounds.append((seconds(sessions, options.position, together=True), peer.seconds()))
    peer.close()
    ours, theirs = (len(sessions) * TOKENS / min(t) for t in zip(*rounds[1:], strict=True))
    ratios = sorted(b / a for a, b in rounds[1:])
    print(
        f"{len(sessions):8}  llama.cpp {theirs:.1f}, slmtvm {ours:.1f} tokens/s:"
        f" {statistics.median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--position", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", help="the same weights for llama.cpp, a GGUF file")
    parser.add_argument("--peer-python", default=sys.executable)
    options = parser.parse_args()
    with ExitStack() as stack:
        model = Model(options.bundle, threads=options.threads)
        stack.callback(model.close)
        sessions = [stack.enter_context(Session(model)) for _ in range(max(options.sessions))]
        for session in sessions:
            session.eval([PROMPT_TOKEN] * options.position)
        print("sessions  one by one  together  ratio  (tokens/s; least to greatest ratio)")
        for count in options.sessions:
            chosen, rounds = sessions[:count], []
            for _ in range(options.rounds + 1):  # the first one warms up
                times = [seconds(chosen, options.position, together=kind) for kind in (False, True)]
                rounds.append(times)
            alone, together = (count * TOKENS / min(t) for t in zip(*rounds[1:], strict=True))
            ratios = sorted(a / b for a, b in rounds[1:])
            print(
                f"{count:8}  {alone:10.1f}  {together:8.1f}  {statistics.median(ratios):5.2f}"
                f"  ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )
        for count in options.sessions if options.peer else ():
            compare(options, sessions[:count])


if __name__ == "__main__":
    main()
