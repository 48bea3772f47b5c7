"""Checks a bundle on a GPU: its logits against the CPU's, bit for bit, and how fast it decodes,
with kernels launched in all ways that there are.

    python3 check_cuda.py BUNDLE [--tokens N] [--prompt N] [--way WAY]

BUNDLE was compiled for a target with [cuda], which brings a CPU's library along. Writes JSON to
standard output, and ends with 1 where a bit differs. Needs Python's standard library, a CUDA driver
and no network; check_cuda.sh runs it with NVIDIA's tools as well.
"""

from __future__ import annotations

import argparse
import array
import ctypes
import json
import os
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

WAYS = {"as compiled": "", "graph": "graph", "direct": "direct"}
"""How kernels are launched: with the persistent kernel where the bundle has it; by CUDA graphs;
each on its own."""
CUDA = "cuda"  # what a library for a GPU requires
# Attributes of a device, of cuda.h.
MULTIPROCESSORS, KILOHERTZ, L2_BYTES, MEMORY_KILOHERTZ, MEMORY_BITS = 16, 13, 38, 36, 37
MAJOR, MINOR, INTEGRATED = 75, 76, 18


class CheckError(Exception):
    """What keeps the check from being made."""


class _Options(ctypes.Structure):  # slm_options of slm.h
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("threads", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("cores", ctypes.c_char_p),
        ("public_keys", ctypes.c_char_p),
        ("least_counter", ctypes.c_uint64),
        ("weights_key", ctypes.c_char_p),
    )


def main() -> int:
    options = argparse.ArgumentParser(description="Check a bundle on a GPU.")
    options.add_argument("bundle", type=Path)
    options.add_argument("--tokens", type=int, default=200, help="to decode (default: 200)")
    options.add_argument("--prompt", type=int, default=128, help="its tokens (default: 128)")
    options.add_argument("--way", choices=WAYS, help="launch kernels in this way alone")
    given = options.parse_args()
    try:
        ways = [given.way] if given.way else list(WAYS)
        report = check(given.bundle, given.prompt, given.tokens, ways)
    except (CheckError, OSError, KeyError, ValueError) as error:
        print(f"{given.bundle}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2))
    found = report["differing_logits"].values()
    return int(any(count for way in found for count in way.values()))


def check(bundle: Path, prompt: int, tokens: int, ways: list[str]) -> dict[str, Any]:
    """What both libraries compute, and how long that takes."""
    targets = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["targets"]
    gpus = [name for name, entry in targets.items() if CUDA in entry["requires"]]
    machine = platform.machine()
    others = [n for n, e in targets.items() if n not in gpus and e["arch"] == machine]
    if not gpus or not others:
        raise CheckError("needs libraries for a GPU and for this CPU")
    threads = len(os.sched_getaffinity(0))
    want, cpu_seconds = decode(bundle, others[0], prompt, tokens, threads)
    differing, seconds = {}, {}
    for way in ways:
        os.environ["SLM_CUDA_LAUNCH"] = WAYS[way]  # read where a model is opened
        got, seconds[way] = decode(bundle, gpus[0], prompt, tokens, 1)
        differing[way] = {name: _differing(got[name], want[name]) for name in want}
    weights = (bundle / "weights.bin").stat().st_size
    return {
        "gpu": card(),
        "machine": machine,
        "targets": [gpus[0], others[0]],
        "differing_logits": differing,
        "gpu_seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "cpu_threads": threads,
        "weights_bytes": weights,
        # Of what a token reads; beyond the L2 cache where weights_bytes are several times l2_bytes.
        "weights_gb_per_second": {
            way: round(weights * s["tokens"] / s["decode"] / 1e9, 2) for way, s in seconds.items()
        },
    }


def _differing(got: array.array[float], want: array.array[float]) -> int:
    """How many floats have other bits."""
    a, b = memoryview(got).cast("B").cast("I"), memoryview(want).cast("B").cast("I")
    if len(a) != len(b):
        raise CheckError(f"{len(a)} logits where the CPU has {len(b)}")
    return sum(x != y for x, y in zip(a, b, strict=True)) if a != b else 0


def decode(
    bundle: Path, target: str, most: int, count: int, threads: int
) -> tuple[dict[str, array.array[float]], dict[str, float]]:
    """Logits of a prompt of ``most`` tokens and of each of ``count`` after it, fewer where the
    context is short, and the seconds that these took."""
    session = _Session(bundle, target, threads)
    vocabulary, context = int(session.info["vocab_size"]), int(session.info["context"])
    chosen = random.Random(1)
    count = min(count, context // 2)
    length = min(context - count, most)
    prompt = [chosen.randrange(vocabulary) for _ in range(length)]
    session.eval(prompt)  # the first run of a function prepares it
    session.seek(0)
    begin = time.perf_counter()
    logits = session.eval(prompt)
    after_prompt = time.perf_counter()
    found, last = array.array("f"), logits
    session.eval([0])
    session.seek(length)
    each: list[float] = []
    for _ in range(count):
        token = last.index(max(last))
        before = time.perf_counter()
        last = session.eval([token])
        each.append(time.perf_counter() - before)
        found.extend(last)
    session.close()
    seconds = {
        "prompt": after_prompt - begin,
        "prompt_tokens": length,
        "decode": sum(each),
        "tokens": count,
        "median": sorted(each)[count // 2],
    }
    return {"prompt": logits, "decode": found}, seconds


class _Session:
    """A library's model and a session of it."""

    def __init__(self, bundle: Path, target: str, threads: int) -> None:
        self._library = ctypes.CDLL(str((bundle / "lib" / f"{target}.so").resolve()))
        self._library.slm_info.restype = ctypes.c_char_p
        self._library.slm_last_error.restype = ctypes.c_char_p
        pointer = ctypes.c_void_p
        self._library.slm_eval.argtypes = (pointer, pointer, ctypes.c_size_t, pointer)
        self._library.slm_seek.argtypes = (pointer, ctypes.c_int32)
        self.info: dict[str, Any] = json.loads(self._library.slm_info().decode())
        if self.info["kind"] != "decoder":
            raise CheckError(f"is an {self.info['kind']}; this checks decoders")
        self._model, self._session = pointer(), pointer()
        options = _Options(ctypes.sizeof(_Options), threads, 0, None, None, 0, None)
        self._call("slm_open", str(bundle).encode(), ctypes.byref(options),
                   ctypes.byref(self._model))  # fmt: skip
        self._call("slm_session_new", self._model, ctypes.byref(self._session))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise CheckError(f"{name}: {self._library.slm_last_error().decode()} ({code})")

    def eval(self, tokens: list[int]) -> array.array[float]:
        """Logits of the last token."""
        given = (ctypes.c_int32 * len(tokens))(*tokens)
        logits = array.array("f", bytes(4 * int(self.info["vocab_size"])))
        self._call("slm_eval", self._session, given, len(tokens), logits.buffer_info()[0])
        return logits

    def seek(self, position: int) -> None:
        self._call("slm_seek", self._session, position)

    def close(self) -> None:
        self._call("slm_session_free", self._session)
        self._call("slm_close", self._model)


def card() -> dict[str, Any]:
    """What the driver says of the GPU."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuInit(0)
    name, version = ctypes.create_string_buffer(100), ctypes.c_int()
    driver.cuDeviceGetName(name, len(name), 0)
    driver.cuDriverGetVersion(ctypes.byref(version))

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), which, 0)
        return value.value

    return {
        "name": name.value.decode(),
        "cuda": version.value / 1000,
        "arch": f"sm_{attribute(MAJOR)}{attribute(MINOR)}",
        "multiprocessors": attribute(MULTIPROCESSORS),
        "mhz": attribute(KILOHERTZ) // 1000,
        "l2_bytes": attribute(L2_BYTES),
        "memory_bits": attribute(MEMORY_BITS),
        "memory_mhz": attribute(MEMORY_KILOHERTZ) // 1000,
        "integrated": bool(attribute(INTEGRATED)),
    }


if __name__ == "__main__":
    sys.exit(main())
