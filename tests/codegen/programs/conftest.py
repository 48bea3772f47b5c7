"""The demo model's bundle, and slm-serve for this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slmtvm.runtime.serving import server_program
from tests.codegen.programs.serving import Server, serving
from tests.end_to_end.bundles import CPU_TARGETS, bundle_for


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_for(tmp_path_factory, "demo", CPU_TARGETS)


@pytest.fixture(scope="session")
def program(demo: Path) -> Path:
    return server_program(demo)


@pytest.fixture(scope="module")
def server(program: Path, demo: Path) -> Iterator[Server]:
    with serving(program, demo, ["--name", "pycode"]) as running:
        yield running
