"""What this machine can run."""

from __future__ import annotations

import platform
from collections.abc import Iterable

import pytest

from slmtvm.host import cpu_features, cpuinfo, missing
from slmtvm.target import Target, host_target, known_targets


def is_native(target: Target) -> bool:
    """Whether the target's instruction set is this machine's, so that nothing emulates it."""
    return target.arch == platform.machine()


def lacking(target: Target) -> str | None:
    """Why this machine's CPU cannot run a native target, or None: qemu-user has no AVX-512."""
    if not is_native(target):
        return None
    lacks = missing(target.requires, cpu_features(cpuinfo()))
    return f"this CPU lacks {', '.join(lacks)} for {target.name}" if lacks else None


def runnable_targets(names: Iterable[str] = ()) -> list[Target]:
    """Those targets that this CPU is not too old for; of all that come with slmtvm by default."""
    return [t for t in map(Target.load, names or known_targets()) if lacking(t) is None]


# One target of each architecture in the fast tests, all of them in the slow ones.
_FAST = {host_target().name, "cortex-a78", "riscv64-rvv"}
EVERY_TARGET = [
    pytest.param(name, marks=[] if name in _FAST else pytest.mark.slow) for name in known_targets()
]
