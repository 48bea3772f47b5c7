"""Bundles of the demo model's forms, compiled once for all tests of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmtvm.compiler import compile_model
from slmtvm.target import host_target
from tests.machines import runnable_targets
from tests.models import TOKENIZER, model_path
from tests.shared_folder import made_once

CPU_TARGETS = ("x86-64-v4-vnni", "x86-64-v3", "cortex-a78", "cortex-a72", "riscv64-rvv")
# Of these, what this machine runs or emulates: qemu-user has no AVX-512.
RUNNABLE = tuple(target.name for target in runnable_targets(CPU_TARGETS))
# One of each architecture.
TARGETS_OF_THREE = tuple(sorted({host_target().name, "cortex-a78", "riscv64-rvv"}))
# Forms that are compiled for all targets. Layers and cache do not know of each other: each of both
# meets one kind of the other.
CACHES = {"float32": "f32", "int4_asymmetric": "f16", "int8": "int8"}
CONTEXT = 320  # tokens: a window of 256 and some


def bundle_for(
    factory: pytest.TempPathFactory, form: str, targets: tuple[str, ...], kv: str | None = None
) -> Path:
    """The bundle of a form of the demo model for ``targets``; test processes share it."""
    targets = tuple(host_target().name if name == "host" else name for name in targets)

    def compile_it(path: Path) -> None:
        compile_model(
            model_path(form), targets, output=path, context=CONTEXT, tokenizer=TOKENIZER, kv=kv
        )

    name = f"{form}-{'+'.join(targets)}{'-' + kv if kv else ''}.slm"
    return made_once(factory, name, compile_it)


def bundle_of_all_targets(factory: pytest.TempPathFactory, form: str) -> Path:
    """The bundle of one of ``CACHES`` for every CPU target that can be run here."""
    return bundle_for(factory, form, RUNNABLE, CACHES[form])
