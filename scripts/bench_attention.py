#!/usr/bin/env python3
"""What attention kernels take: by context with a window and without, by mask, by kind of cache.

    python scripts/bench_attention.py [--target x86-64-v3] [--rounds 15] [--only window]

One thread; the entries of a group take turns, so that what else runs meets all of them alike, and
times are the thread's own. A line gives the median time and the median, least and largest ratio to
the group's first entry in the same turn.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np

from slmtvm.codegen.objects import write_object
from slmtvm.codegen.zig import zig_cc
from slmtvm.host import runs_here
from slmtvm.schedules import attention, isa
from slmtvm.schedules.attention import AttentionShape, block_tables
from slmtvm.schedules.kernel import Kernel, Tensor
from slmtvm.schedules.vector import LANES
from slmtvm.target import Target

TURN_SECONDS = 0.02
ALIGNMENT = 64
HEADS, KV_HEADS, HEAD_DIM, CONTEXT, STEP = 8, 4, 64, 8192, 128
TOKENS, BLOCK = 2048, 128
WINDOW = 512

Call = Callable[[], None]


@dataclass
class Entry:
    """Kernels on their operands; ``seconds`` of a call in each round."""

    name: str
    run: Call = field(repr=False)
    cache_bytes: int = 0
    seconds: list[float] = field(default_factory=list)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy of ``array`` that begins at a multiple of 64 bytes."""
    room = np.zeros(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    made = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made


class Bench:
    """Kernels of one target, compiled once each."""

    def __init__(self, target: Target, folder: Path) -> None:
        self._target, self._folder = target, folder
        self._loaded: dict[str, Callable[..., None]] = {}

    def shape(self, m: int, **fields: object) -> AttentionShape:
        """The layer that is measured, on ``m`` rows."""
        shape = AttentionShape(m, HEADS, KV_HEADS, HEAD_DIM, CONTEXT, HEAD_DIM**-0.5)
        shape = replace(shape, **fields)  # type: ignore[arg-type]
        return attention.suited(shape, isa.get(self._target.isa))

    def call(self, kernel: Kernel, buffers: dict[str, np.ndarray], scalar: int) -> Call:
        """The whole grid of ``kernel`` on ``buffers``, those it lacks made."""
        function = self._load(kernel)
        held = [buffers.setdefault(t.name, _filled(t)) for t in kernel.tensors]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in held]
        numbers = [ctypes.c_int32(scalar)] * len(kernel.scalars)
        bounds = [ctypes.c_int32(0), ctypes.c_int32(kernel.grid)]

        def run(_held: list[np.ndarray] = held) -> None:  # which must live as long
            function(*pointers, *numbers, *bounds)

        return run

    def _load(self, kernel: Kernel) -> Callable[..., None]:
        name = str(kernel.func.attrs["global_symbol"])
        if name not in self._loaded:
            path = self._folder / f"{len(self._loaded)}.o"
            write_object({name: kernel.func}, self._target, path)
            library = path.with_suffix(".so")
            flags = ["-shared", "-o", str(library), str(path)]
            zig_cc(f"{self._target.arch}-linux-musl", flags)
            self._loaded[name] = getattr(ctypes.CDLL(str(library)), name)
        return self._loaded[name]


def _filled(tensor: Tensor) -> np.ndarray:
    rng = np.random.default_rng(0)
    if tensor.dtype in ("int8", "uint8"):
        return aligned(rng.integers(17, 120, tensor.shape).astype(tensor.dtype))
    return aligned((0.1 * rng.standard_normal(tensor.shape)).astype(tensor.dtype))


def by_context(bench: Bench) -> list[Entry]:
    """A decoded token at some positions, with a window and its ring, and without."""
    entries = []
    ring = attention.ring_of(WINDOW, STEP, CONTEXT)
    kinds = {
        f"window {WINDOW}": {"window": WINDOW, "ring": ring}, "no window": {},
    }  # fmt: skip
    for name, fields in kinds.items():
        shape = bench.shape(1, kv_dtype="float16", **fields)
        buffers: dict[str, np.ndarray] = {}
        for position in (WINDOW, 1024, 2048, 4096, CONTEXT - 1):
            call = bench.call(attention.build_decode(shape), buffers, position)
            entries.append(Entry(f"{name}, at {position}", call, _cache_bytes(shape)))
    return entries


def by_mask(bench: Bench) -> list[Entry]:
    """All rows of a sequence under some masks; first sequences of one block's length."""
    places = np.arange(TOKENS)
    behind = places[:, None] - places
    masks = {
        "blocks, as a list": places[:, None] // BLOCK == places // BLOCK,
        "band of 64 either way": np.abs(behind) <= 64,
        "band of 64, 2 global": (np.abs(behind) <= 64) | (places < 2) | (places[:, None] < 2),
    }
    small = bench.shape(BLOCK, mask="bidirectional", capacity=BLOCK)
    alone = bench.call(attention.build_attend(small), {}, BLOCK)

    def sixteen() -> None:
        for _ in range(TOKENS // BLOCK):
            alone()

    entries = [Entry(f"{TOKENS // BLOCK} sequences of {BLOCK}", sixteen)]
    whole = bench.shape(TOKENS, mask="bidirectional", capacity=TOKENS)
    blocks = replace(whole, chunk=BLOCK)
    entries.append(
        Entry(f"blocks of {BLOCK}", bench.call(attention.build_attend(blocks), {}, TOKENS))
    )
    for name, visible in masks.items():
        mask, lists = block_tables(visible[None], KV_HEADS, TOKENS, rows=LANES)
        buffers = {key: aligned(array) for key, array in lists.items()}
        kernel = attention.build_attend(replace(whole, blocks=mask))
        entries.append(Entry(name, bench.call(kernel, buffers, TOKENS)))
    entries.append(Entry("all", bench.call(attention.build_attend(whole), {}, TOKENS)))
    return entries


def by_cache(bench: Bench) -> list[Entry]:
    """A decoded token late in the context, by how the cache holds keys and values."""
    entries = []
    for kv_dtype in ("float32", "float16", "int8", "int4"):
        shape = bench.shape(1, kv_dtype=kv_dtype)
        call = bench.call(attention.build_decode(shape), {}, CONTEXT - 1)
        entries.append(Entry(kv_dtype, call, _cache_bytes(shape)))
    return entries


def _cache_bytes(shape: AttentionShape) -> int:
    return sum(int(np.prod(t.shape)) * np.dtype(t.dtype).itemsize for t in shape.cache)


GROUPS: dict[str, Callable[[Bench], list[Entry]]] = {
    "context": by_context, "mask": by_mask, "cache": by_cache,
}  # fmt: skip


def measure(entries: list[Entry], rounds: int) -> None:
    """Fill in ``seconds``; a round before the first one is not counted."""
    for turn in range(rounds + 1):
        for entry in entries:
            calls, start = 0, time.thread_time()
            while (spent := time.thread_time() - start) < TURN_SECONDS:
                entry.run()
                calls += 1
            if turn:
                entry.seconds.append(spent / calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="host")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=list(GROUPS))
    options = parser.parse_args()
    target = Target.load(options.target)
    if not runs_here(target.arch, target.requires):
        parser.error(f"this machine cannot run {target.name}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(target, Path(folder))
        for group in options.only:
            entries = GROUPS[group](bench)
            measure(entries, options.rounds)
            for entry in entries:
                pairs = zip(entry.seconds, entries[0].seconds, strict=True)
                ratios = sorted(own / first for own, first in pairs)
                size = f"  cache {entry.cache_bytes / 1e6:.2f} MB" if entry.cache_bytes else ""
                print(
                    f"{group:8} {entry.name:26} {median(entry.seconds) * 1e6:9.1f} us  "
                    f"x{median(ratios):.2f} [{ratios[0]:.2f}..{ratios[-1]:.2f}]{size}"
                )


if __name__ == "__main__":
    main()
