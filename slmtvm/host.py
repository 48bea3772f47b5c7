"""The target "host": the best known target that this machine's CPU can run."""

from __future__ import annotations

import platform
from pathlib import Path

from slmtvm.errors import TargetError
from slmtvm.target import Target

# Best first; the first one whose features the machine has is taken.
_CANDIDATES = {
    "x86_64": ("x86-64-v4-vnni", "x86-64-v3"),
    "aarch64": ("cortex-a78", "cortex-a72"),
    "riscv64": ("riscv64-rvv",),
}
# /proc/cpuinfo's names where they differ from those in a target's ``requires``.
CPUINFO_NAMES = {"rvv": "v"}


def cpu_features(cpuinfo: str) -> set[str]:
    """The feature names of a /proc/cpuinfo text: x86 "flags", Arm "Features", RISC-V "isa"."""
    features: set[str] = set()
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            features.update(value.split())
        elif key.strip() == "isa":
            base = value.strip().lower().split("_")[0].removeprefix("rv64")
            features.update(base)
    return features


def runs_here(target: Target) -> bool:
    """Whether this machine's CPU has what ``target`` needs."""
    features = cpu_features(Path("/proc/cpuinfo").read_text(errors="replace"))
    has_all = all(CPUINFO_NAMES.get(r, r) in features for r in target.requires)
    return target.arch == platform.machine() and has_all


def host_target(machine: str | None = None, cpuinfo: str | None = None) -> Target:
    """The target of the machine that this runs on.

    Raises TargetError where the architecture is unknown or the CPU is older than every target.
    """
    machine = machine or platform.machine()
    names = _CANDIDATES.get(machine)
    if names is None:
        raise TargetError(
            f"no target for this machine's architecture {machine!r}; "
            f"known are {', '.join(_CANDIDATES)}",
            where="host",
        )
    features = cpu_features(Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo)
    for name in names:
        target = Target.load(name)
        if all(CPUINFO_NAMES.get(r, r) in features for r in target.requires):
            return target
    raise TargetError(
        f"this {machine} CPU lacks what the targets {', '.join(names)} need", where="host"
    )
