#!/usr/bin/env python3
"""Compares slmtvm's speed with onnxruntime, onnxruntime-genai and llama.cpp on the same weights.

    pip install '.[peers]'
    python scripts/bench_peers.py MODELS [--models NAME ...] [--threads 1 2] [--json FILE]

Pruned encoders (--models pruned-f32-80 ...) are made on the way and need no MODELS; they are
compared with DeepSparse as well, which wants older packages than slmtvm, so an environment of its
own:

    python3.11 -m venv deepsparse && deepsparse/bin/pip install --group peers-sparse
    python scripts/bench_peers.py --models pruned-f32-80 --deepsparse deepsparse/bin/python

MODELS is a folder made by scripts/make_bench_models.py. Every engine runs in a process of its own
(scripts/peer_engines.py), is given token ids and chooses greedily. They take turns: in each round
every engine measures once, the order rotating, and a ratio is taken within a round, so that what
disturbs the machine for longer than a round disturbs all alike. Reported are medians over rounds.

llama-cpp-python builds llama.cpp on installation; where that one is not to be measured (another
instruction set), LLAMA_CPP_LIB_PATH names a folder with other libraries.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
from pruned_encoder import write_pruned_encoder

import slmtvm
from slmtvm.target import Target

ENGINES = Path(__file__).with_name("peer_engines.py")
DECODERS = ("demo", "tiny15", "smol135")
ENCODERS = ("minilm",)
PRUNED: dict[str, dict[str, Any]] = {  # what ``write_pruned_encoder`` takes
    "pruned-f32-80": {"zeros": 0.8},
    "pruned-f32-90": {"zeros": 0.9},
    "pruned-int8-80": {"zeros": 0.8, "int8": True},
    "pruned-int8-80-1x4": {"zeros": 0.8, "along_k": 4, "int8": True},
}
DEEPSPARSE = "deepsparse"
OURS = "slmtvm"
SEED = 0
PROMPT_TOKENS = 128  # of a prefill, and of an encoder's text
DECODE_PROMPT = 16
DECODE_TOKENS = 128
LOWEST_TOKEN, HIGHEST_TOKEN = 1000, 4000  # ordinary ids in every vocabulary
REPETITIONS = 3  # within a turn, after one that is not counted
PAUSE_SECONDS = 0.05  # lets the threads of the last engine go to sleep
REGRESSION = 0.10  # of a ratio, against a recorded one


@dataclass(frozen=True)
class Phase:
    """What is timed: the command for an engine, and how many tokens it stands for."""

    name: str
    command: dict[str, Any]
    tokens: int


@dataclass(frozen=True)
class Result:
    """One row: tokens/s, each the median over rounds, and ratios ours / peer, round by round, with
    their quartiles."""

    model: str
    threads: int
    phase: str
    ours: float
    peers: dict[str, float]
    ratios: dict[str, float]
    best: str  # the peer with the most tokens/s
    ratio_to_best: float
    quartiles: dict[str, tuple[float, float]] = field(default_factory=dict)


class Worker:
    """An engine's process, in the environment of a Python."""

    def __init__(
        self, engine: str, path: Path, threads: int, python: str = sys.executable
    ) -> None:  # fmt: skip
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [python, str(ENGINES), engine, str(path), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        self._name = f"{engine} on {path}"
        self.settings: dict[str, Any] = self._answer()["settings"]

    def measure(self, command: dict[str, Any]) -> float:
        """Seconds of ``command``, the median of some after one to warm up."""
        times = [self.ask(command) for _ in range(REPETITIONS + 1)]
        time.sleep(PAUSE_SECONDS)
        return median(times[1:])

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._process.pid

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, command: dict[str, Any]) -> float:
        """Seconds of ``command``, once."""
        assert self._process.stdin is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            sys.exit(f"{self._name} ended (code {self._process.wait()}):\n{self._log.read()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def phases(model: str) -> list[Phase]:
    """What is measured of ``model``."""
    rng = np.random.default_rng(SEED)
    prompt = [int(t) for t in rng.integers(LOWEST_TOKEN, HIGHEST_TOKEN, PROMPT_TOKENS)]
    if model in ENCODERS or model in PRUNED:
        command = {"phase": "encode", "tokens": prompt}
        return [Phase(f"encode {PROMPT_TOKENS}", command, PROMPT_TOKENS)]
    decode = {"phase": "decode", "tokens": prompt[:DECODE_PROMPT], "count": DECODE_TOKENS}
    return [
        Phase(f"prefill {PROMPT_TOKENS}", {"phase": "prefill", "tokens": prompt}, PROMPT_TOKENS),
        Phase("decode", decode, DECODE_TOKENS),
    ]


def engine_files(model: str, folder: Path) -> dict[str, Path]:
    """The peers that can run ``model``, and what each opens."""
    if model in PRUNED:
        path = write_pruned_encoder(folder / f"{model}.onnx", **PRUNED[model])
        return {"onnxruntime-encoder": path, DEEPSPARSE: path}
    if model in ENCODERS:
        return {"onnxruntime-encoder": folder / "model_int8.onnx"}
    return {
        "onnxruntime": folder / "int4" / "model.onnx",
        "onnxruntime-genai": folder / "int4",
        "llama.cpp": folder / "int4.gguf",
    }


def compile_ours(model: str, folder: Path, target: str, output: Path) -> Path:
    """The bundle of the ONNX file that the peers run too."""
    encodes = model in ENCODERS or model in PRUNED
    name = "model_int8.onnx" if encodes else "int4/model.onnx"
    name = f"{model}.onnx" if model in PRUNED else name
    context = None if encodes else 1024
    slmtvm.compile(folder / name, [target], output=output, context=context)
    return output


def measure(
    model: str, files: dict[str, Path], threads: int, rounds: int, deepsparse: str
) -> tuple[list[Result], dict[str, Any]]:
    """All phases of one model, engines in turns; and how each engine ran."""
    pythons = {DEEPSPARSE: deepsparse}
    workers = {
        name: Worker(name, path, threads, pythons.get(name, sys.executable))
        for name, path in files.items()
    }
    settings = {name: worker.settings for name, worker in workers.items()}
    results = []
    for phase in phases(model):
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        order = list(workers)
        for _ in range(rounds):
            for name in order:
                seconds[name].append(workers[name].measure(phase.command))
            order.append(order.pop(0))
        results.append(summarise(model, threads, phase, seconds))
    for worker in workers.values():
        worker.close()
    return results, settings


def summarise(model: str, threads: int, phase: Phase, seconds: dict[str, list[float]]) -> Result:
    """Seconds by engine and round -> a row."""
    rates = {name: phase.tokens / median(times) for name, times in seconds.items()}
    ours = rates.pop(OURS, float("nan"))
    by_round = {
        name: [p / o for p, o in zip(seconds[name], seconds[OURS], strict=True)]
        for name in rates
        if OURS in seconds
    }
    ratios = {name: median(by_round.get(name, [float("nan")])) for name in rates}
    quartiles = {
        name: (cuts[0], cuts[2])
        for name, found in by_round.items()
        if len(found) > 1 and (cuts := quantiles(found, method="inclusive"))
    }
    best = max(rates, key=lambda name: rates[name])
    return Result(model, threads, phase.name, ours, rates, ratios, best, ratios[best], quartiles)


def show(results: list[Result]) -> str:
    """The table for people."""
    title = "peers: tokens/s (ours / peer [quartiles])"
    lines = [f"{'model':8} {'threads':>7} {'phase':12} {'ours':>10}  {title}"]
    for r in results:
        spread = {n: f" [{low:.2f}..{high:.2f}]" for n, (low, high) in r.quartiles.items()}
        peers = "  ".join(
            f"{n} {rate:,.0f} ({r.ratios[n]:.2f}{spread.get(n, '')})" for n, rate in r.peers.items()
        )
        lines.append(f"{r.model:8} {r.threads:>7} {r.phase:12} {r.ours:>10,.0f}  {peers}")
    return "\n".join(lines)


def regressions(results: list[Result], recorded: list[dict[str, Any]]) -> list[str]:
    """The rows whose ratio to the best peer fell by more than REGRESSION."""
    before = {(r["model"], r["threads"], r["phase"]): r["ratio_to_best"] for r in recorded}
    found = []
    for r in results:
        old = before.get((r.model, r.threads, r.phase))
        if old is not None and r.ratio_to_best < old * (1 - REGRESSION):
            found.append(
                f"regression: {r.model}, {r.threads} threads, {r.phase}: "
                f"{r.ratio_to_best:.2f} times the best peer, recorded {old:.2f}"
            )
    return found


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="MODELS", nargs="?")
    parser.add_argument("--models", nargs="+", choices=(*DECODERS, *ENCODERS, *PRUNED))
    parser.add_argument("--deepsparse", default=sys.executable, metavar="PYTHON",
                        help="the Python that has deepsparse installed")  # fmt: skip
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--target", default="host", help="what ours is compiled for (default host)")
    parser.add_argument("--without", nargs="+", default=[], metavar="ENGINE", help="leave out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("--against", type=Path, metavar="FILE", help="an earlier --json; exit code "
                        f"1 where a ratio fell by more than {REGRESSION:.0%}")  # fmt: skip
    options = parser.parse_args()
    models = options.models or (*DECODERS, *ENCODERS)
    if options.folder is None and not set(models) <= set(PRUNED):
        parser.error("MODELS is needed, but for pruned encoders")
    return options


def main() -> int:
    options = _arguments()
    target = Target.load(options.target).name
    results: list[Result] = []
    settings: dict[str, Any] = {}
    for model in options.models or (*DECODERS, *ENCODERS):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) if model in PRUNED else options.folder / model
            files = engine_files(model, folder)
            if OURS not in options.without:
                bundle = Path(scratch) / "model.slm"
                files = {OURS: compile_ours(model, folder, target, bundle), **files}
            files = {name: path for name, path in files.items() if name not in options.without}
            for threads in options.threads:
                rows, how = measure(model, files, threads, options.rounds, options.deepsparse)
                results += rows
                settings[f"{model}, {threads} threads"] = how
                print(show(rows), flush=True)
    if options.json:
        report = {
            "cpu": _cpu(),
            "target": target,
            "rounds": options.rounds,
            "results": [asdict(r) for r in results],
            "settings": settings,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    found: list[str] = []
    if options.against:
        recorded = json.loads(options.against.read_text())
        for name, here in (("cpu", _cpu()), ("target", target)):
            if recorded[name] != here:
                print(f"recorded with another {name}: {recorded[name]}, here {here}")
        found = regressions(results, recorded["results"])
        print("\n".join(found) or "no regression")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
