"""The devices that packages are tried on: this machine, and two that qemu-user emulates."""

from __future__ import annotations

import shutil

import pytest

from slmtvm.target import Target
from tests.emulation.session import CPUS
from tests.machines import is_native, lacking

TARGETS = ("cortex-a78", "riscv64-rvv")
HOST = Target.load("host").name
DEVICES = (HOST, *TARGETS)


def emulator(name: str) -> list[str]:
    """What a static program of target ``name`` is started with here; skips where nothing can."""
    target = Target.load(name)
    if reason := lacking(target):
        pytest.skip(reason)
    if is_native(target):
        return []
    qemu = f"qemu-{target.arch}-static"
    if shutil.which(qemu) is None:
        pytest.skip(f"no {qemu} here; on Debian and Ubuntu: apt install qemu-user-static")
    return [qemu, "-cpu", CPUS[target.arch][0]]


def tool(name: str, package: str) -> str:
    """The path of the program ``name``; skips, naming the Debian package, where there is none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here; on Debian and Ubuntu: apt install {package}")
    return path
