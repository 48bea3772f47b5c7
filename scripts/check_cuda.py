"""Checks a bundle on a GPU: its logits against the CPU's, bit for bit, and how fast it decodes,
with kernels launched in all ways that there are.

    python scripts/check_cuda.py BUNDLE [--tokens N]

BUNDLE was compiled for a target with [cuda], which brings a CPU's library along. Writes JSON to
standard output, and ends with 1 where a bit differs. Needs a CUDA driver and no network.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time

import numpy as np

from slmtvm.bundle import Bundle
from slmtvm.bundle.manifest import CUDA
from slmtvm.runtime.model import Model
from slmtvm.runtime.session import Session

WAYS = {"as compiled": "", "graph": "graph", "direct": "direct"}
"""How kernels are launched: with the persistent kernel where the bundle has it; by CUDA graphs;
each on its own."""


def main() -> int:
    options = argparse.ArgumentParser(description="Check a bundle on a GPU.")
    options.add_argument("bundle")
    options.add_argument("--tokens", type=int, default=200, help="to decode (default: 200)")
    given = options.parse_args()
    targets = Bundle.open(given.bundle).manifest.targets
    gpus = [name for name, entry in targets.items() if CUDA in entry.requires]
    others = [n for n, e in targets.items() if n not in gpus and e.arch == platform.machine()]
    if not gpus or not others:
        print(f"{given.bundle}: needs libraries for a GPU and for this CPU", file=sys.stderr)
        return 2
    want, cpu_seconds = decode(given.bundle, others[0], given.tokens)
    differing, seconds = {}, {}
    for way, setting in WAYS.items():
        os.environ["SLM_CUDA_LAUNCH"] = setting  # read where a model is opened
        got, seconds[way] = decode(given.bundle, gpus[0], given.tokens)
        differing[way] = {
            name: int((a.view(np.uint32) != want[name].view(np.uint32)).sum())
            for name, a in got.items()
        }
    report = {
        "gpu": card(), "targets": [gpus[0], others[0]], "differing_logits": differing,
        "gpu_seconds": seconds, "cpu_seconds": cpu_seconds,
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    return int(any(count for found in differing.values() for count in found.values()))


def decode(bundle: str, target: str, count: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Logits of a prompt and of each token after it, and the seconds that these took."""
    model = Model(bundle, target=target)
    session = Session(model)
    vocabulary = int(model.info["vocab_size"])
    room = int(model.info["context"]) - count
    prompt = np.random.default_rng(1).integers(0, vocabulary, max(1, min(room, 128)))
    session.eval(prompt)  # the first run of a function prepares it
    session.seek(0)
    begin = time.perf_counter()
    logits = session.eval(prompt)
    after_prompt = time.perf_counter()
    found = [logits]
    session.eval([0])
    session.seek(len(prompt))
    begin_decode = time.perf_counter()
    for _ in range(count):
        found.append(session.eval([int(np.argmax(found[-1]))]))
    seconds = {"prompt": after_prompt - begin, "decode": time.perf_counter() - begin_decode}
    session.close()
    model.close()
    return {"prompt": found[0], "decode": np.stack(found[1:])}, seconds


def card() -> str:
    """What the driver calls the GPU; "unknown" where nvidia-smi is not there."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
