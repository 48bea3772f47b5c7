"""The server for the device, run on this machine."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

from slmtvm.bundle import Bundle
from slmtvm.codegen.program import kept_program
from slmtvm.host import cpu_features, cpuinfo
from slmtvm.runtime.model import choose_target


def server_program(bundle: str | Path, *, progress: Callable[[str], None] | None = None) -> Path:
    """slm-serve with the model of ``bundle`` for this machine: linked once, then kept in the cache.

    It takes the bundle as its first argument. Raises BundleError where the bundle is damaged or has
    nothing for this machine, SlmError where the program cannot be linked.
    """
    opened = Bundle.open(bundle)
    opened.verify()  # the program reads the weights and the tables as they are
    target = choose_target(
        opened.manifest.targets, platform.machine(), cpu_features(cpuinfo()), f"{bundle}"
    )
    return kept_program(opened, target, "serve", progress=progress)
