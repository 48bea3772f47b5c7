"""As many threads compute a function as pay, whatever else the machine does.

pace.c is fed with calls of a simulated machine: how long they take, by threads, and what is lost.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

from slmtvm.codegen.zig import zig_cc
from slmtvm.target import Target

RUNTIME = Path(__file__).parents[2] / "slmtvm" / "codegen" / "runtime"
MS = 1_000_000  # nanoseconds
SLICE = 3 * MS  # for which the kernel takes a core away


class Mean(ctypes.Structure):
    """slm_mean."""

    _fields_ = (("nanoseconds", ctypes.c_double), ("calls", ctypes.c_double))


class Pace(ctypes.Structure):
    """slm_pace."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("most", "threads", "chosen", "settled")),
        ("downs", ctypes.c_uint),
        ("mean", Mean),
        ("before", Mean),
        ("computed", ctypes.c_double),
        ("kept", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("begun", "lost", "counted", "hold", "until")),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("pace") / "pace.so"
    zig_cc(
        Target.load("host").link,
        [
            "-shared",
            "-fPIC",
            "-std=gnu11",
            f"-I{RUNTIME}",
            str(RUNTIME / "pace.c"),
            "-o",
            str(path),
        ],
    )
    return ctypes.CDLL(str(path))


class Machine:
    """Calls of one function, one after the other, on a machine with ``most`` threads."""

    def __init__(self, library: ctypes.CDLL, most: int) -> None:
        self._library = library
        self._pace, self._preemptions = Pace(), (ctypes.c_int64 * 3)()
        library.slm_pace_init(ctypes.byref(self._pace), most)
        self._now = 1000 * MS
        self._owed = 0.0  # time of the caller's and the workers' slices

    @property
    def threads(self) -> int:
        return self._pace.threads

    def run(
        self, calls: int, nanoseconds: Callable[[int], float], busy: Callable[[int], float]
    ) -> dict[int, int]:
        """How many calls had how many threads.

        ``nanoseconds``: what a call takes, by threads. ``busy``: slices lost in a millisecond.
        """
        counts: dict[int, int] = {}
        for _ in range(calls):
            threads = self._pace.threads
            counts[threads] = counts.get(threads, 0) + 1
            # What the kernel counts of this real thread is nothing that was simulated.
            self._preemptions[0] = self._now
            now = ctypes.c_int64(self._now)
            self._library.slm_pace_begin(
                ctypes.byref(self._pace), ctypes.byref(self._preemptions), now
            )
            self._now += int(nanoseconds(threads))
            self._owed += nanoseconds(threads) / MS * busy(threads)
            while self._owed >= 1:
                self._owed -= 1
                self._now += SLICE
                self._library.slm_pace_stalled(
                    ctypes.byref(self._pace), ctypes.c_int64(SLICE), ctypes.c_int64(self._now)
                )
            self._library.slm_pace_end(ctypes.byref(self._pace), ctypes.c_int64(self._now))
        return counts


def idle(threads: int) -> float:
    return 0.0


def contended(threads: int) -> float:
    """A worker loses its core every 3 ms."""
    return 1 / 3 if threads > 1 else 0.0


def perfect(threads: int) -> float:
    return 100_000 / threads


def useless(threads: int) -> float:
    return 100_000 + 1_000 * threads


def test_threads_that_pay_are_kept_on_an_idle_machine(library: ctypes.CDLL) -> None:
    machine = Machine(library, 4)
    counts = machine.run(20_000, perfect, idle)
    assert counts[4] > 0.98 * 20_000
    assert machine.threads == 4


def test_a_function_that_threads_do_not_speed_up_is_left_to_one(library: ctypes.CDLL) -> None:
    counts = Machine(library, 2).run(20_000, useless, idle)
    assert counts[1] > 0.9 * 20_000


@pytest.mark.parametrize("most", [2, 4])
def test_one_thread_computes_where_others_lose_their_cores(library: ctypes.CDLL, most: int) -> None:
    machine = Machine(library, most)
    slow = machine.run(20_000, lambda threads: 100_000 / (1 + 0.2 * (threads - 1)), contended)
    assert slow[1] > 0.9 * 20_000


def test_threads_that_pay_in_spite_of_what_they_lose_are_kept(library: ctypes.CDLL) -> None:
    def little(threads: int) -> float:
        return 0.1 if threads > 1 else 0.0  # 23% of the time, of a gain of half

    counts = Machine(library, 2).run(20_000, perfect, little)
    assert counts[2] > 0.9 * 20_000


def test_threads_come_back_when_the_machine_is_idle_again(library: ctypes.CDLL) -> None:
    machine = Machine(library, 2)
    busy = machine.run(20_000, lambda threads: 100_000 - 10_000 * (threads - 1), contended)
    assert busy[1] > 0.9 * 20_000
    machine.run(10_000, perfect, idle)  # a second
    assert machine.threads == 2


def test_one_long_stop_of_the_whole_process_changes_little(library: ctypes.CDLL) -> None:
    machine = Machine(library, 2)
    machine.run(5_000, perfect, idle)
    machine.run(1, lambda threads: 1000 * MS, idle)
    counts = machine.run(5_000, perfect, idle)
    assert counts[2] > 0.95 * 5_000
