"""Bundles of the demo model's forms, compiled once for all tests of a run."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from slmtvm.compiler import compile_model
from slmtvm.target import host_target
from tests.models import TOKENIZER, model_path

CPU_TARGETS = ("x86-64-v4-vnni", "x86-64-v3", "cortex-a78", "cortex-a72", "riscv64-rvv")
# One of each architecture.
TARGETS_OF_THREE = tuple(sorted({host_target().name, "cortex-a78", "riscv64-rvv"}))
CONTEXT = 320  # tokens: a window of 256 and some


def bundle_for(
    factory: pytest.TempPathFactory, form: str, targets: tuple[str, ...], kv: str | None = None
) -> Path:
    """The bundle of a form of the demo model for ``targets``; test processes share it."""
    # pytest-xdist gives each worker a folder in the run's own. Without it, what is above the run's
    # folder belongs to earlier runs too, of another compiler.
    base = factory.getbasetemp()
    targets = tuple(host_target().name if name == "host" else name for name in targets)
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bundles"
    folder.mkdir(exist_ok=True)
    path = folder / f"{form}-{'+'.join(targets)}{'-' + kv if kv else ''}.slm"
    with (folder / f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            compile_model(
                model_path(form), targets, output=path, context=CONTEXT, tokenizer=TOKENIZER, kv=kv
            )
    return path
