#!/usr/bin/env python3
"""Speed on a machine where other processes run too, and within a quota, by threads.

    python scripts/bench_busy.py MODEL [--peers FOLDER] [--threads 1 2 3] [--rounds 7] [--json FILE]

MODEL: an ONNX file of a decoder, or a bundle. FOLDER: one model's folder of make_bench_models.py,
with the same weights for the peers. Engines and numbers of threads take turns of half a second,
beside 0, 1 and 2 processes that only spin, and at last alone with half a core's time: by a control
group where this machine lets us make one, else by stopping the process half of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from bench_peers import OURS, Phase, Worker, engine_files, phases

import slmtvm

TURN_SECONDS = 0.5
SETTLE_SECONDS = 0.3
SPINNING = (0, 1, 2)
QUOTA = 0.5  # cores
PERIOD_SECONDS = 0.1
GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cell:
    """Tokens/s of one engine with so many threads beside what else runs, one number a round."""

    engine: str
    threads: int
    phase: str
    beside: str
    rates: tuple[float, ...]


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """``count`` processes that do nothing but compute."""
    processes = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(count)]
    try:
        time.sleep(SETTLE_SECONDS)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def quota(pid: int) -> Iterator[str]:
    """Lets the process have QUOTA cores; yields how."""
    group = GROUPS / f"slmtvm-bench-{os.getpid()}"
    try:
        # Not a folder of that name, and one that hands the controller of time on.
        if "cpu" not in (GROUPS / "cgroup.subtree_control").read_text().split():
            raise OSError("no control group can be made")
        group.mkdir()
        period = int(PERIOD_SECONDS * 1e6)
        (group / "cpu.max").write_text(f"{int(QUOTA * period)} {period}")
        home = GROUPS / Path(f"/proc/{pid}/cgroup").read_text().strip().rpartition("::")[2][1:]
        (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        if group.exists():
            group.rmdir()
        with stopping(pid):
            yield f"half a core, by stops of {PERIOD_SECONDS * QUOTA * 1e3:.0f} ms"
        return
    try:
        yield "half a core, by a control group"
    finally:
        (home / "cgroup.procs").write_text(str(pid))
        group.rmdir()


@contextmanager
def stopping(pid: int) -> Iterator[None]:
    """Stops the process for its part of every period."""
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(PERIOD_SECONDS * (1 - QUOTA))
            os.kill(pid, signal.SIGCONT)
            time.sleep(PERIOD_SECONDS * QUOTA)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def turn(worker: Worker, phase: Phase) -> float:
    """Tokens/s of TURN_SECONDS."""
    seconds, tokens = 0.0, 0
    while seconds < TURN_SECONDS:
        seconds += worker.ask(phase.command)
        tokens += phase.tokens
    return tokens / seconds


def measure(workers: dict[tuple[str, int], Worker], rounds: int) -> Iterator[list[Cell]]:
    """Cells, as many at a time as run in turns."""
    decode, prefill = (next(p for p in phases("demo") if p.name.startswith(n)) for n in ("d", "p"))
    for count in SPINNING:
        for phase in (decode, prefill):
            with spinning(count):
                rates: dict[tuple[str, int], list[float]] = {key: [] for key in workers}
                for _ in range(rounds):
                    for key, worker in workers.items():
                        rates[key].append(turn(worker, phase))
            yield [Cell(*k, phase.name, f"{count} spinning", tuple(v)) for k, v in rates.items()]
    for key, worker in workers.items():
        with quota(worker.pid) as how:
            yield [Cell(*key, decode.name, how, tuple(turn(worker, decode) for _ in range(rounds)))]


def show(cells: list[Cell]) -> str:
    """A line for each: tokens/s, and how many times those of one thread and of the best peer."""
    lines = []
    for cell in cells:
        same = [c for c in cells if (c.phase, c.beside) == (cell.phase, cell.beside)]
        one = next((c for c in same if (c.engine, c.threads) == (cell.engine, 1)), cell)
        peers = [c for c in same if c.engine != OURS and c.threads == cell.threads]
        text = (
            f"{cell.beside:30} {cell.phase:12} {cell.engine:18} {cell.threads} threads "
            f"{median(cell.rates):8,.0f} ({min(cell.rates):,.0f} to {max(cell.rates):,.0f}) "
            f"{ratio(cell, one):5.2f} of one"
        )
        if peers and cell.engine == OURS:
            best = max(peers, key=lambda c: median(c.rates))
            text += f" {ratio(cell, best):5.2f} of {best.engine}"
        lines.append(text)
    return "\n".join(lines)


def ratio(cell: Cell, other: Cell) -> float:
    """The median over the rounds."""
    return median(a / b for a, b in zip(cell.rates, other.rates, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", type=Path, metavar="FOLDER")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = options.model
        if bundle.suffix == ".onnx":
            bundle = Path(scratch) / "model.slm"
            slmtvm.compile(options.model, ["host"], output=bundle)
        files = {OURS: bundle, **(engine_files("demo", options.peers) if options.peers else {})}
        workers = {
            (name, count): Worker(name, path, count)
            for count in options.threads
            for name, path in files.items()
        }
        cells: list[Cell] = []
        for found in measure(workers, options.rounds):
            cells += found
            print(show(found), flush=True)
        for worker in workers.values():
            worker.close()
    if options.json:
        options.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
