"""What this machine's CPU has, and which targets suit it."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path

from slmtvm.errors import TargetError

# Best first; the first one whose features the machine has is taken.
_CANDIDATES = {
    "x86_64": ("x86-64-v4-vnni", "x86-64-v3"),
    "aarch64": ("cortex-a78", "cortex-a72"),
    "riscv64": ("riscv64-rvv",),
}
# /proc/cpuinfo's names where they differ from those in a target's ``requires``.
_CPUINFO_NAMES = {"rvv": "v"}


def cpuinfo() -> str:
    """What Linux says of this machine's CPUs."""
    return Path("/proc/cpuinfo").read_text(errors="replace")


def cpu_features(text: str) -> set[str]:
    """The feature names of a /proc/cpuinfo text: x86 "flags", Arm "Features", RISC-V "isa"."""
    features: set[str] = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            features.update(value.split())
        elif key.strip() == "isa":
            base = value.strip().lower().split("_")[0].removeprefix("rv64")
            features.update(base)
    return features


def missing(requires: Iterable[str], features: set[str]) -> list[str]:
    """Those of a target's ``requires`` that are not among a CPU's ``features``."""
    return [name for name in requires if _CPUINFO_NAMES.get(name, name) not in features]


def runs_here(arch: str, requires: Iterable[str]) -> bool:
    """Whether this machine's CPU has what a target needs."""
    return arch == platform.machine() and not missing(requires, cpu_features(cpuinfo()))


def candidates(machine: str) -> tuple[str, ...]:
    """The targets for an architecture, best first; raises TargetError where there is none."""
    if machine not in _CANDIDATES:
        raise TargetError(
            f"no target for this machine's architecture {machine!r}; "
            f"known are {', '.join(_CANDIDATES)}",
            where="host",
        )
    return _CANDIDATES[machine]


def architectures() -> tuple[str, ...]:
    """All that targets are known of, this machine's first."""
    return tuple(sorted(_CANDIDATES, key=lambda arch: arch != platform.machine()))


def cpu_name() -> str:
    """The name of this machine's CPU."""
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
