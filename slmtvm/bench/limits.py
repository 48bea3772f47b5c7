"""What this machine can do at most: bytes read and multiply-adds a second, for so many threads."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from slmtvm.bench import probes
from slmtvm.bench.probes import Probe
from slmtvm.target import Target

_SECONDS = 0.05  # of one measurement
_ROUNDS = 5
DOT_BLOCKS = 256  # divides among threads


@dataclass(frozen=True)
class Limits:
    """The best of several measurements.

    ``read_bytes_per_second`` when ``working_set`` bytes are read over and over, as a decoder reads
    its weights for every token: from a cache where they fit into one.
    """

    threads: int
    working_set: int
    read_bytes_per_second: float
    multiply_adds_per_second: float

    def best(self, other: Limits) -> Limits:
        """The better of two measurements of the same."""
        return replace(
            self,
            read_bytes_per_second=max(self.read_bytes_per_second, other.read_bytes_per_second),
            multiply_adds_per_second=max(
                self.multiply_adds_per_second, other.multiply_adds_per_second
            ),
        )

    def seconds(self, bytes_read: float, multiply_adds: float) -> float:
        """The least time for so much work."""
        return max(
            bytes_read / self.read_bytes_per_second, multiply_adds / self.multiply_adds_per_second
        )


class LimitProbe:
    """Measures the limits of this machine for the instructions of one target."""

    def __init__(self, target: Target, working_set: int) -> None:
        """``working_set``: bytes; rounded up to whole pieces of the reading kernel."""
        isa = probes.isa_of(target)
        self._pieces = max(-(-working_set // probes.PIECE_BYTES), 1)
        self._working_set = self._pieces * probes.PIECE_BYTES
        readers = [probes.read_kernel(ahead, self._pieces) for ahead in probes.READ_AHEAD]
        self._dots = probes.dot_kernels(isa, DOT_BLOCKS)
        built = probes.build_probes(target, [*readers, *(dot.kernel for dot in self._dots)])
        self._readers, self._multipliers = built[: len(readers)], built[len(readers) :]
        # Pages of its own: 4 KiB each where the weights are mapped from a file, so here too.
        memory = mmap.mmap(-1, self._working_set)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._data = np.frombuffer(memory, np.int32)
        self._data.fill(1)
        self._sums = np.zeros((self._pieces, 16), np.int32)

    def measure(self, threads: int) -> Limits:
        """The limits for ``threads`` threads, which divide the work evenly."""
        read = [self._data, self._sums]
        passes = max(_rate(probe, read, self._pieces, threads) for probe in self._readers)
        multiply_adds = 0.0
        for dot, probe in zip(self._dots, self._multipliers, strict=True):
            buffers = [np.ones(t.shape, t.dtype) for t in dot.kernel.tensors]
            rate = _rate(probe, buffers, DOT_BLOCKS, threads)
            multiply_adds = max(multiply_adds, rate * DOT_BLOCKS * dot.block_multiply_adds)
        return Limits(threads, self._working_set, passes * self._working_set, multiply_adds)


def _rate(probe: Probe, buffers: Sequence[np.ndarray], blocks: int, threads: int) -> float:
    """How many times a second all ``blocks`` are run, each thread running its share of them."""
    times = 1
    while (seconds := _seconds(probe, buffers, blocks, threads, times)) < _SECONDS:
        times = max(2 * times, int(times * _SECONDS / max(seconds, 1e-9)))
    best = min(_seconds(probe, buffers, blocks, threads, times) for _ in range(_ROUNDS))
    return times / best


def _seconds(
    probe: Probe, buffers: Sequence[np.ndarray], blocks: int, threads: int, times: int
) -> float:
    barrier = threading.Barrier(threads)
    spans: list[tuple[float, float]] = []
    pointers = [buffer.ctypes.data for buffer in buffers]

    def work(index: int) -> None:
        begin, end = blocks * index // threads, blocks * (index + 1) // threads
        barrier.wait()
        started = time.perf_counter()
        probe.run(pointers, begin, end, times)
        spans.append((started, time.perf_counter()))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(1, threads)]
    for worker in workers:
        worker.start()
    work(0)
    for worker in workers:
        worker.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)
