#!/usr/bin/env python3
"""Linear kernels that skip zeros against the dense ones, by pattern and share of zeros.

    python scripts/bench_sparse.py [--target x86-64-v3] [--rounds 15] [--formats int4] [--json FILE]

One thread; kernels take turns, so that what else runs meets all of them alike, and times are the
thread's own. A line gives the median time and the median, least and largest ratio to the dense
kernel of the same turn. "cache": one matrix, that the second level of cache holds; "memory":
copies of a larger one, more than the last level does.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np

from slmtvm.codegen.objects import write_object
from slmtvm.codegen.zig import zig_cc
from slmtvm.host import runs_here
from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.schedules.isa import PAIRS, WINDOWS, Isa
from slmtvm.schedules.kernel import Kernel
from slmtvm.schedules.linear import (
    LinearShape,
    blocks,
    listed_blocks,
    listed_weights,
    pairs,
    turned_bytes,
    turned_pairs,
    turned_rows,
    windows,
)
from slmtvm.schedules.linear.packed_rows import pack_rows
from slmtvm.schedules.linear.shape import FREE, IN_LISTS
from slmtvm.target import Target

TURN_SECONDS = 0.02
COPIES_BYTES = 96_000_000
SETTINGS = {  # rows, channels, inputs, whether the weights come from memory
    "decode, cache": (1, 1024, 1024, False),
    "decode, memory": (1, 4096, 4096, True),
    "16 rows": (16, 1536, 576, False),
    "64 rows": (64, 1536, 576, False),
}
PATTERNS = ((8, 4), (32, 4), (16, 1), (1, 4), (1, 1))
SHARES = (0.5, 0.7, 0.8, 0.9)
NEIGHBOURS = ((2, 4), (1, 4))
GROUP = 32  # of int4 weights
DENSE = {"int8": "dense", "int4": "dense int4"}


@dataclass
class Entry:
    """A kernel on its operands; ``dense`` names the entry that it is compared with, ``seconds`` are
    of a call in each round."""

    name: str
    dense: str
    setting: str
    density: float
    weight_bytes: int
    expected: float
    run: Callable[[], int] = field(repr=False)
    seconds: list[float] = field(default_factory=list)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy of ``array`` that begins at a multiple of 64 bytes."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    made = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made


def load(kernel: Kernel, target: Target, folder: Path) -> Callable:
    """The compiled kernel."""
    name = str(kernel.func.attrs["global_symbol"])
    write_object({name: kernel.func}, target, folder / f"{name}.o")
    library = folder / f"{name}.so"
    zig_cc(f"{target.arch}-linux-musl", ["-shared", "-o", str(library), str(folder / f"{name}.o")])
    return getattr(ctypes.CDLL(str(library)), name)


def entry(
    name: str,
    setting: str,
    shape: LinearShape,
    weights: linear.Weights,
    isa: Isa,
    load_kernel: Callable[[LinearShape], tuple[Callable, Kernel]],
) -> Entry:
    """``shape`` on ``weights`` in as many copies as the setting wants."""
    function, kernel = load_kernel(shape)
    packed = linear.pack(shape, isa, weights).values()
    size = sum(array.nbytes for array in packed)
    copies = max(1, COPIES_BYTES // size) if SETTINGS[setting][3] else 1
    y = aligned(np.zeros((shape.m, shape.n), np.float32))
    beside = [
        aligned(np.zeros(tensor.shape, tensor.dtype))
        for tensor in kernel.tensors
        if tensor.name == "scratch"
    ]
    calls = [[*activations(shape, isa), *map(aligned, packed), y, *beside] for _ in range(copies)]
    arguments = [
        [
            *(ctypes.c_void_p(a.ctypes.data) for a in arrays),
            ctypes.c_int32(0),
            ctypes.c_int32(kernel.grid),
        ]
        for arrays in calls
    ]

    def run() -> int:
        for given in arguments:
            function(*given)
        return len(calls)

    density, expected = 1.0, 1.0
    if shape.window == PAIRS.name:
        density, expected = PAIRS.kept / PAIRS.size, pairs.relative_time(shape, isa)
    elif shape.window == FREE:
        density = listed_weights.density(shape, weights) or 1.0
        expected = listed_weights.relative_time(shape, isa, density)
    elif shape.in_lists:
        density = listed_blocks.density(shape, weights)
        expected = listed_blocks.relative_time(shape, isa, density)
    elif shape.window:
        window = WINDOWS[shape.window]
        density = window.kept / window.size
        expected = windows.relative_time(shape.window, isa, shape.m)
    elif shape.sparse:
        density = blocks.density(shape, isa, weights)
        expected = blocks.relative_time(shape, isa, density)
    return Entry(name, DENSE[shape.format], setting, density, size, expected, run)


def activations(shape: LinearShape, isa: Isa) -> list[np.ndarray]:
    """What the kernel takes of its rows; where they come turned, that took no time."""
    rng = np.random.default_rng(0)
    if shape.in_turned_pairs:
        pairs_of, scales = (t.shape for t in turned_pairs.activations(shape, isa))
        given = rng.integers(-(2**15), 2**15, pairs_of).astype(np.int16)
        return [aligned(given), aligned(np.ones(scales, np.float32))]
    if shape.window == FREE:
        size = turned_bytes.tensor(shape).shape
        turned = aligned(rng.integers(0, 256, size).astype(np.uint8))
        return [turned, np.ones(shape.m, np.float32), np.full(shape.m, 128, np.int32)]
    if shape.in_lists or shape.turned:
        size = turned_rows.tensor(shape, isa).shape
        words = aligned(rng.integers(-(2**31), 2**31, size).astype(np.int32))
        return [words, np.ones(shape.m, np.float32), np.full(shape.m, 128, np.int32)]
    if shape.activation == "block":
        xq = aligned(rng.integers(-127, 128, (shape.m, shape.padded_k)).astype(np.int8))
        sums = xq.reshape(shape.m, shape.groups, -1).sum(axis=2, dtype=np.int32)
        return [xq, np.ones(sums.shape, np.float32), aligned(sums.astype(np.float32))]
    xq = aligned(rng.integers(0, 256, (shape.m, shape.padded_k)).astype(np.uint8))
    return [xq, np.ones(shape.m, np.float32), np.full(shape.m, 128, np.int32)]


def pruned(n: int, k: int, block: tuple[int, int], share: float) -> np.ndarray:
    """Random weights, ``share`` of whose blocks, the smallest, are zero; each channel scaled to
    int8."""
    weight = np.random.default_rng(1).standard_normal((n, k))
    size = np.abs(weight).reshape(n // block[0], block[0], k // block[1], block[1])
    size = size.sum(axis=(1, 3))
    zero = size < np.quantile(size, share)
    weight[np.repeat(np.repeat(zero, block[0], axis=0), block[1], axis=1)] = 0
    largest = np.maximum(np.abs(weight).max(axis=1, keepdims=True), 1e-9)
    return np.round(weight / largest * 127).astype(np.int8)


def kept_of(n: int, k: int, kept: int, size: int) -> np.ndarray:
    """Random int8 weights, ``kept`` of every ``size`` neighbours along k not zero."""
    rng = np.random.default_rng(1)
    weight = rng.integers(1, 128, (n, k)) * rng.choice([-1, 1], (n, k))
    order = rng.random((n, k // size, size)).argsort(axis=2)
    return np.where((order < kept).reshape(n, k), weight, 0).astype(np.int8)


def entries(setting: str, target: Target, folder: Path, formats: list[str]) -> list[Entry]:
    """The dense kernels, each followed by the sparse ones."""
    found = int8_entries(setting, target, folder) if "int8" in formats else []
    return found + (int4_entries(setting, target, folder) if "int4" in formats else [])


def loader(
    isa: Isa, target: Target, folder: Path
) -> Callable[[LinearShape], tuple[Callable, Kernel]]:
    """What compiles the kernel of a shape, once."""
    loaded: dict[LinearShape, tuple[Callable, Kernel]] = {}

    def load_kernel(shape: LinearShape) -> tuple[Callable, Kernel]:
        if shape not in loaded:
            kernel = linear.build(shape, isa)
            loaded[shape] = load(kernel, target, folder), kernel
        return loaded[shape]

    return load_kernel


def int8_entries(setting: str, target: Target, folder: Path) -> list[Entry]:
    isa = isas.get(target.isa)
    m, n, k, _ = SETTINGS[setting]
    dense = LinearShape(m, n, k, "int8", "row_u8")
    load_kernel = loader(isa, target, folder)

    def made(name: str, shape: LinearShape, weight: np.ndarray) -> Entry:
        weights = linear.Weights(weight, np.full(n, 0.01, np.float32))
        return entry(name, setting, shape, weights, isa, load_kernel)

    found = [made("dense", dense, pruned(n, k, (1, 1), 0.0))]
    for block in PATTERNS:
        for share in SHARES:
            weight = pruned(n, k, block, share)
            name = f"{block[0]}x{block[1]}, {share:.0%}"
            shape = replace(dense, sparse=True, turned=blocks.turns(m, isa))
            found.append(made(name, shape, weight))
            if isa.listed_blocks is not None and m > 1:
                shape = replace(dense, sparse=True, window=IN_LISTS)
                found.append(made(f"{name} rows", shape, weight))
            if isa.listed_weights is not None and m > 1:
                shape = replace(dense, sparse=True, window=FREE)
                if listed_weights.density(shape, linear.Weights(weight)) is not None:
                    found.append(made(f"{name} free", shape, weight))
    for kept, size in NEIGHBOURS:
        weight = kept_of(n, k, kept, size)
        for window in isa.window_times:
            shape = replace(dense, sparse=True, window=window)
            if windows.fits(WINDOWS[window], linear.Weights(weight)):
                found.append(made(f"{kept}:{size} as {window}", shape, weight))
    return found


def int4_entries(setting: str, target: Target, folder: Path) -> list[Entry]:
    isa = isas.get(target.isa)
    if isa.pair_times is None:
        return []
    m, n, k, _ = SETTINGS[setting]
    load_kernel = loader(isa, target, folder)
    dense = LinearShape(m, n, k, "int4", "block", GROUP, scale_dtype="float16")
    weight = kept_of(n, k, *NEIGHBOURS[0]) // 16
    scales = np.full((n, dense.groups), 1 / 128, np.float32)
    weights = linear.Weights(pack_rows((weight + 8).astype(np.uint8), dense.bits), scales)
    sparse = replace(dense, sparse=True, window=PAIRS.name)
    sparse = replace(sparse, turned=linear.turns(sparse, isa))
    found = [
        entry(name, setting, shape, weights, isa, load_kernel)
        for name, shape in ((DENSE["int4"], dense), ("int4 2:4", sparse))
    ]
    if sparse.turned:
        found.append(with_turning(found[-1], sparse, isa, target, folder))
    return found


def with_turning(made: Entry, shape: LinearShape, isa: Isa, target: Target, folder: Path) -> Entry:
    """The entry with its rows turned before each call, as where no other layer has them."""
    kernel = turned_pairs.turning(shape, isa)
    function = load(kernel, target, folder)
    given = [*activations(replace(shape, sparse=False, window="", turned=False), isa)[:2]]
    given += [aligned(np.zeros(t.shape, t.dtype)) for t in turned_pairs.activations(shape, isa)]
    bounds = ctypes.c_int32(0), ctypes.c_int32(kernel.grid)
    arguments = [*(ctypes.c_void_p(a.ctypes.data) for a in given), *bounds]

    def run(kept: list[np.ndarray] = given) -> int:
        function(*arguments)
        return made.run()

    return replace(made, name=f"{made.name} and turning", run=run, seconds=[])


def measure(found: list[Entry], rounds: int) -> None:
    """Fill in ``seconds``; a round before the first one is not counted."""
    for turn in range(rounds + 1):
        for one in found:
            calls, start = 0, time.thread_time()
            while (spent := time.thread_time() - start) < TURN_SECONDS:
                calls += one.run()
            if turn:
                one.seconds.append(spent / calls)


def report(found: list[Entry]) -> list[dict[str, object]]:
    """Print a line for each entry; the same as data."""
    rows = []
    for one in found:
        dense = next(other for other in found if other.name == one.dense)
        ratios = sorted(d / s for d, s in zip(dense.seconds, one.seconds, strict=True))
        print(
            f"{one.setting:15} {one.name:20} blocks {one.density:4.0%} "
            f"{median(one.seconds) * 1e6:9.1f} us  x{median(ratios):.2f} "
            f"[{ratios[0]:.2f}..{ratios[-1]:.2f}]  "
            f"bytes x{dense.weight_bytes / one.weight_bytes:.2f}  model x{1 / one.expected:.2f}"
        )
        rows.append({k: v for k, v in asdict(replace(one, run=int)).items() if k != "run"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="host")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--formats", nargs="+", choices=DENSE, default=list(DENSE))
    parser.add_argument("--only", default="", help="entries whose names hold this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    target = Target.load(options.target)
    if not runs_here(target.arch, target.requires):
        parser.error(f"this machine cannot run {target.name}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for setting in options.settings:
            every = entries(setting, target, Path(folder), options.formats)
            found = [one for one in every if options.only in one.name]
            wanted = {one.dense for one in found} - {one.name for one in found}
            found += [one for one in every if one.name in wanted]
            measure(found, options.rounds)
            rows += report(found)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
