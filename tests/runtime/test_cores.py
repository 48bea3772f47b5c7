"""How many threads a model gets: as many as there are cores that it may really use."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from slmtvm.codegen.zig import zig_cc
from slmtvm.runtime.interface import ERR_ARGUMENT
from slmtvm.target import Target

RUNTIME = Path(__file__).parents[2] / "slmtvm" / "codegen" / "runtime"
# Also the four cores that are bound: a machine may have fewer.
AFFINITY = """
#define _GNU_SOURCE
#include <sched.h>
#include <string.h>
int sched_getaffinity(pid_t pid, size_t size, cpu_set_t *set) {
  (void)pid;
  memset(set, 0, size);
  for (int i = 0; i < 4; ++i) CPU_SET(i, set);
  return 0;
}
"""


class Cores(ctypes.Structure):
    """slm_cores."""

    _fields_ = (
        ("threads", ctypes.c_int),
        ("count", ctypes.c_int),
        ("mixed", ctypes.c_int),
        ("all", ctypes.c_int),
        ("pinned", ctypes.c_int),
        ("set", ctypes.c_uint64 * 16),
        ("list", ctypes.c_char * 128),
        ("why", ctypes.c_char * 160),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """cores.c, for a process that is bound to cores 0 to 3."""
    folder = tmp_path_factory.mktemp("cores")
    (folder / "affinity.c").write_text(AFFINITY)
    sources = [str(RUNTIME / name) for name in ("cores.c", "error.c")]
    zig_cc(
        Target.load("host").link,
        ["-shared", "-fPIC", "-std=gnu11", "-D_GNU_SOURCE", f"-I{RUNTIME}", *sources,
         str(folder / "affinity.c"), "-o", str(folder / "cores.so"), "-Wl,-Bsymbolic"],
    )  # fmt: skip
    return ctypes.CDLL(str(folder / "cores.so"))


class Machine:
    """A tree of /proc and /sys, and what is chosen there."""

    def __init__(self, library: ctypes.CDLL, root: Path) -> None:
        self._library, self._root = library, root

    def write(self, path: str, text: str) -> None:
        file = self._root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def speeds(self, name: str, *values: int) -> None:
        for core, value in enumerate(values):
            self.write(f"/sys/devices/system/cpu/cpu{core}/{name}", f"{value}\n")

    def choose(self, asked: int = 0, cores: str | None = None, all_threads: bool = False) -> Cores:
        chosen = Cores()
        listed = None if cores is None else cores.encode()
        code = self._library.slm_cores_choose(
            asked, listed, int(all_threads), os.fsencode(self._root), ctypes.byref(chosen)
        )
        if code:
            assert code == ERR_ARGUMENT
            self._library.slm_last_error.restype = ctypes.c_char_p
            raise ValueError(self._library.slm_last_error().decode())
        return chosen


@pytest.fixture
def machine(library: ctypes.CDLL, tmp_path: Path) -> Machine:
    return Machine(library, tmp_path)


def test_a_machine_that_says_nothing_has_the_cores_that_the_process_is_bound_to(
    machine: Machine,
) -> None:
    chosen = machine.choose()
    assert (chosen.threads, chosen.list, chosen.pinned, chosen.mixed) == (4, b"0-3", 0, 0)
    assert chosen.why == b"4 cores to run on"


@pytest.mark.parametrize(
    ("text", "threads"),
    [("max 100000", 4), ("200000 100000", 2), ("50000 100000", 1), ("150000 100000", 2),
     ("1000 100000", 1), ("900000 100000", 4), ("", 4), ("nonsense", 4)],
)  # fmt: skip
def test_a_quota_of_a_control_group_bounds_the_threads(
    machine: Machine, text: str, threads: int
) -> None:
    machine.write("/proc/self/cgroup", "0::/box\n")
    machine.write("/sys/fs/cgroup/box/cpu.max", text)
    assert machine.choose().threads == threads
    assert machine.choose(asked=3).threads == min(3, threads)
    assert machine.choose(asked=3, all_threads=True).threads == 3


def test_the_smallest_quota_of_all_groups_around_the_process_counts(machine: Machine) -> None:
    machine.write("/proc/self/cgroup", "0::/a/b/c\n")
    machine.write("/sys/fs/cgroup/a/b/c/cpu.max", "max 100000")
    machine.write("/sys/fs/cgroup/a/b/cpu.max", "300000 100000")
    machine.write("/sys/fs/cgroup/cpu.max", "200000 100000")
    chosen = machine.choose()
    assert chosen.threads == 2
    assert chosen.why == b"the control group's quota is 2 cores"


def test_the_quota_of_a_group_of_version_1_counts(machine: Machine) -> None:
    machine.write("/proc/self/cgroup", "5:memory:/a\n4:cpu,cpuacct:/a\n0::/\n")
    machine.write("/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "50000\n")
    machine.write("/sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n")
    assert machine.choose().threads == 1
    machine.write("/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1\n")
    assert machine.choose().threads == 4


@pytest.mark.parametrize("name", ["cpu_capacity", "cpufreq/cpuinfo_max_freq"])
def test_of_cores_that_differ_the_fast_ones_are_used_where_no_number_is_given(
    machine: Machine, name: str
) -> None:
    machine.speeds(name, 530, 530, 1024, 1000)
    chosen = machine.choose()
    assert (chosen.threads, chosen.list, chosen.pinned, chosen.mixed) == (2, b"2-3", 1, 0)
    assert chosen.why == b"2 of 4 cores are fast"
    chosen = machine.choose(asked=4)
    assert (chosen.threads, chosen.list, chosen.pinned, chosen.mixed) == (4, b"0-3", 0, 1)


def test_cores_whose_clocks_differ_a_little_are_of_one_kind(machine: Machine) -> None:
    machine.speeds("cpu_capacity", 1024, 980, 900, 1024)
    assert (machine.choose().threads, machine.choose().mixed) == (4, 0)


def test_cores_that_are_listed_are_used_and_bound_to(machine: Machine) -> None:
    chosen = machine.choose(cores="1-2")
    assert (chosen.threads, chosen.list, chosen.pinned) == (2, b"1-2", 1)
    assert machine.choose(cores="3,0", asked=1).list == b"0,3"


@pytest.mark.parametrize(
    "text", ["", "a", "1-", "-1", "2-1", "1,,2", "1,", "1 2", "0-99999", "0x1"]
)
def test_what_is_no_list_of_cores_is_refused(machine: Machine, text: str) -> None:
    with pytest.raises(ValueError, match='must be a list such as "4-7,9"'):
        machine.choose(cores=text)


def test_a_list_of_cores_that_the_process_may_not_use_is_refused(machine: Machine) -> None:
    with pytest.raises(ValueError, match="may use 2 of 4"):
        machine.choose(cores="2-5")
